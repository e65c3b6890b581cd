//! Constant load with random faults, for as long as asked: `tests/run soak [SECONDS]`, with `SOAK_SEED` the faults of an earlier
//! run, without those whose description has one of the words of `SOAK_WITHOUT` in it. It ends with a verdict on every device and request, and with what everything held.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a run that fails")]

mod backend;
mod devices;
mod faults;
mod figures;
mod installation;
mod load;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use devices::{Habit, Inhabitant, World, late_arrival};
use faults::Fault;
use figures::Figures;
use installation::Installation;
use load::{DEDUPE_SECONDS, Load, SIGNATURE_SECONDS, Use};
use support::audit::{Audit, Rules};
use support::broadcastd::App;
use support::journal::Journal;
use support::now_ms;
use support::rabbitmq::{ADMINISTRATOR, as_user};
use support::stored::{self, Stored};

const DEVICES_PER_APP: usize = 34;
const PLATFORMS: [&str; 5] = ["ios", "aos", "pc", "web", "mac"];
/// What drain, catching up and the last checks may take.
const END: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    // cargo and people pass flags that mean nothing here.
    let seconds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(600);
    let seed = std::env::var("SOAK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(now_ms);
    println!("soak: {seconds} s, SOAK_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    // A helper that gives up panics: what it says is on standard error.
    let run = || runtime.block_on(soak(Duration::from_secs(seconds), seed));
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(violations) => {
            println!("soak: {violations} violations; again with: SOAK_SEED={seed} tests/run soak {seconds}");
            ExitCode::FAILURE
        }
        Err(_) => {
            println!("soak: it broke off; again with: SOAK_SEED={seed} tests/run soak {seconds}");
            ExitCode::FAILURE
        }
    }
}

struct Soak {
    started: Instant,
    audit: Arc<Mutex<Audit>>,
    installation: Arc<Installation>,
    faults: Mutex<Vec<String>>,
    /// The first thousand lines of what is broken, to be kept with what the processes said.
    broken: Mutex<Vec<String>>,
}

impl Soak {
    fn say(&self, text: &str) {
        println!("[{:>6.1}] {text}", self.started.elapsed().as_secs_f64());
    }

    /// Judges, and says at once what is broken.
    fn judge(&self) {
        let sentences = {
            let mut audit = self.audit.lock().unwrap();
            audit.tick(now_ms());
            audit.take_violations()
        };
        if !sentences.is_empty() {
            let recent = self.faults.lock().unwrap().iter().rev().take(4).cloned().collect::<Vec<_>>();
            self.say(&format!("lately: {}", recent.join("; ")));
        }
        for sentence in sentences {
            self.say(&format!("VIOLATION {sentence}"));
            let mut broken = self.broken.lock().unwrap();
            if broken.len() < 1000 {
                broken.push(format!("{:.1} {sentence}", self.started.elapsed().as_secs_f64()));
            }
        }
    }
}

async fn soak(time: Duration, seed: u64) -> u64 {
    let named = |name: &str, app: App| App { key: format!("{name}-{}", app.key), journal: Journal::off(), ..app };
    let apps = vec![
        (named("busy", App::unlimited()), Use::Busy),
        (named("kept", App::unlimited()), Use::Kept),
        (named("limited", App::new()), Use::Limited),
    ];
    let all: Vec<App> = apps.iter().map(|(app, _)| app.clone()).collect();
    let installation = Arc::new(Installation::start(&all).await);
    let rules = Rules { dedupe_ms: DEDUPE_SECONDS * 1000, resume_ms: 60_000, patience_ms: 120_000, late_ms: 10_000 };
    let audit = Arc::new(Mutex::new(Audit::new(&all, rules)));
    let soak = Arc::new(Soak {
        started: Instant::now(),
        audit: audit.clone(),
        installation: installation.clone(),
        faults: Mutex::default(),
        broken: Mutex::default(),
    });
    soak.say("everything is up");

    let mut background = JoinSet::new();
    background.spawn(read_logs(soak.clone(), all.clone()));
    let dead = audit.clone();
    // The minimal permissions are the roles'; a backend here has a reply queue, and reads the dead letters.
    let backend_url = as_user(&installation.vhost.url, ADMINISTRATOR);
    background.spawn(backend::drain_dead_letters(backend_url.clone(), move |payload, reason| {
        let request: Value = serde_json::from_slice(payload).unwrap_or_default();
        dead.lock().unwrap().dead_letter(request["requestId"].as_str().unwrap_or_default(), reason, now_ms());
    }));
    let mut rng = fastrand::Rng::with_seed(seed);
    let load = Arc::new(Load::new(&audit, &backend_url, apps.clone(), installation.api_urls.clone()));
    let (end, ending) = tokio::sync::watch::channel(BTreeMap::new());
    let world = World {
        audit: audit.clone(),
        urls: installation.device_urls.clone(),
        direct_urls: installation.direct_urls.clone(),
        ending,
    };
    let mut devices = JoinSet::new();
    for app in &all {
        for number in 0..DEVICES_PER_APP {
            let platform = PLATFORMS[number % PLATFORMS.len()];
            let inhabitant = Inhabitant::new(&world, app, platform, Habit::of(number), rng.fork());
            devices.spawn(inhabitant.live());
        }
    }
    let mut loading = JoinSet::new();
    let (running, load_rng) = (load.clone(), rng.fork());
    loading.spawn(async move { running.run(load_rng).await });

    let figures = Arc::new(Mutex::new(Figures::default()));
    let watching = tokio::spawn(watch_over(soak.clone(), load.clone(), time, figures.clone()));
    misfortune(&soak, time, &mut rng).await;
    soak.say("calm: no more load");
    loading.shutdown().await;
    let _ = watching.await;

    // The end: everything decided, everybody caught up.
    let finished = timeout(END, async {
        let mut last = BTreeMap::new();
        while audit.lock().unwrap().open_requests() > 0 {
            sleep(Duration::from_millis(200)).await;
        }
        for app in &all {
            last.insert(app.key.clone(), load.last(app).await);
        }
        soak.say("every request has an end; the devices catch up");
        end.send_replace(last.clone());
        while let Some(done) = devices.join_next().await {
            if let Err(panic) = done {
                audit.lock().unwrap().broken(format!("a device broke off: {panic}"));
            }
        }
        for app in &all {
            for platform in PLATFORMS {
                late_arrival(&world, app, platform).await;
            }
        }
        // Everything that a device has had must have been read from the log by now.
        while all.iter().any(|app| audit.lock().unwrap().head(&app.key) < last[&app.key]) {
            sleep(Duration::from_millis(100)).await;
        }
        sleep(Duration::from_millis(500)).await;
        check_stored(&soak, &all).await
    })
    .await;
    match finished {
        Ok(Ok(())) => {}
        Ok(Err(problem)) => audit.lock().unwrap().broken(format!("Redis could not be read at the end: {problem}")),
        Err(_) => {
            let mut audit = audit.lock().unwrap();
            audit.broken(format!("after {END:?} of calm not everything was at its end: {} devices", devices.len()));
        }
    }
    audit.lock().unwrap().finish(now_ms());
    background.shutdown().await;
    verdict(&soak, Arc::into_inner(figures).unwrap().into_inner().unwrap(), time, seed).await
}

/// Faults until the time is over, then calm.
async fn misfortune(soak: &Arc<Soak>, time: Duration, rng: &mut fastrand::Rng) {
    // Everybody is to be there first.
    sleep(Duration::from_secs(5).min(time / 10)).await;
    let without = std::env::var("SOAK_WITHOUT").unwrap_or_default();
    let without: Vec<String> = without.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    while soak.started.elapsed() < time {
        let first = Fault::draw(rng, &soak.installation, &without);
        let second = Fault::draw(rng, &soak.installation, &without);
        let both = rng.u32(0..3) == 0 && first.victim() != second.victim();
        soak.audit.lock().unwrap().hold(true, now_ms());
        let (delay, calm) = (Duration::from_millis(rng.u64(0..4000)), Duration::from_millis(rng.u64(1000..6000)));
        if both {
            tokio::join!(happen(soak, first, true), async {
                sleep(delay).await;
                happen(soak, second, true).await;
            });
        } else {
            happen(soak, first, false).await;
        }
        let began = Instant::now();
        soak.installation.wait_ready().await;
        soak.audit.lock().unwrap().hold(false, now_ms());
        let recovery = began.elapsed();
        if recovery > Duration::from_secs(5) {
            soak.say(&format!("ready again after {:.1} s", recovery.as_secs_f64()));
        }
        sleep(calm).await;
    }
}

async fn happen(soak: &Arc<Soak>, fault: Fault, beside_another: bool) {
    let text = fault.to_string();
    soak.say(&text);
    soak.faults.lock().unwrap().push(text.clone());
    let result = fault.happen(&soak.installation).await;
    // With a server away, a drain need not come to its end in good order.
    if let (Err(problem), false) = (result, beside_another) {
        soak.audit.lock().unwrap().broken(format!("{text}: {problem}"));
    }
}

/// Reads the apps' logs as they grow: what is true.
async fn read_logs(soak: Arc<Soak>, apps: Vec<App>) {
    let prefix = &soak.installation.stack.prefix;
    loop {
        let Ok(mut connection) = stored::connect(&soak.installation.redis_url).await else {
            sleep(Duration::from_millis(200)).await;
            continue;
        };
        'connected: loop {
            for app in &apps {
                let (after, asked_ms) = (soak.audit.lock().unwrap().head(&app.key), now_ms());
                let Ok(envelopes) = Stored::log_after(&mut connection, prefix, &app.key, after).await else {
                    break 'connected;
                };
                soak.audit.lock().unwrap().log(&app.key, &envelopes, asked_ms);
            }
            sleep(Duration::from_millis(250)).await;
        }
    }
}

/// Judges every second, samples what is held, and prints a line every ten.
async fn watch_over(soak: Arc<Soak>, load: Arc<Load>, time: Duration, figures: Arc<Mutex<Figures>>) {
    // Sampling costs a process and two calls: no more than two hundred times, or every two seconds.
    let (every, line_every) = (Duration::from_secs(2).max(time / 200), Duration::from_secs(10));
    let (mut next, mut next_line) = (every / 2, line_every);
    while soak.started.elapsed() < time {
        sleep(Duration::from_secs(1)).await;
        soak.judge();
        if soak.started.elapsed() >= next {
            next += every;
            let at = soak.started.elapsed().as_secs_f64() / time.as_secs_f64();
            let before_ms = |seconds: u64| now_ms().saturating_sub(seconds * 1000);
            let (kept, accepted) = {
                let audit = soak.audit.lock().unwrap();
                (audit.size(), audit.accepted_since(before_ms(DEDUPE_SECONDS)))
            };
            let remembered = accepted + load.signed_since(before_ms(SIGNATURE_SECONDS));
            figures.lock().unwrap().sample(at, &soak.installation, kept, remembered);
        }
        if soak.started.elapsed() >= next_line {
            next_line += line_every;
            let (counts, open, violations) = {
                let audit = soak.audit.lock().unwrap();
                (audit.counts(), audit.open_requests(), audit.violation_count())
            };
            let (faults, rss) = (soak.faults.lock().unwrap().len(), figures.lock().unwrap().rss_mib());
            soak.say(&format!(
                "{} sent, {open} open, {} accepted, {} refused, {} dead, {} recalls; {} logins, {} arrivals; {faults} faults; \
                 {rss} MiB; {violations} violations",
                counts.sent, counts.accepted, counts.refused, counts.dead, counts.recalls, counts.logins, counts.arrivals,
            ));
        }
    }
}

/// I4 and "charged once", from Redis itself.
async fn check_stored(soak: &Soak, apps: &[App]) -> Result<(), String> {
    let mut connection = stored::connect(&soak.installation.redis_url).await?;
    for app in apps {
        let stored = Stored::read(&mut connection, &soak.installation.stack.prefix, &app.key).await?;
        soak.say(&format!("{}: {} retained, {} in the log", app.key, stored.retained.len(), stored.log.len()));
        soak.audit.lock().unwrap().stored(&app.key, &stored, now_ms());
    }
    Ok(())
}

async fn verdict(soak: &Soak, figures: Figures, time: Duration, seed: u64) -> u64 {
    let (lines, wrong) = figures.report(time < Duration::from_secs(DEDUPE_SECONDS * 10));
    wrong.into_iter().for_each(|sentence| soak.audit.lock().unwrap().broken(sentence));
    soak.judge();
    let (counts, violations) = {
        let audit = soak.audit.lock().unwrap();
        (audit.counts(), audit.violation_count())
    };
    println!("\nI5, over {} s:", time.as_secs());
    lines.iter().for_each(|line| println!("  {line}"));
    let faults = soak.faults.lock().unwrap().len();
    println!(
        "\n{} requests: {} accepted, {} refused, {} dead letters; {} recalls\n{} accepted twice, as an outage was longer than their id is \
         remembered\n{} logins, {} arrivals; not had, as promised: {} \
         expired on the way, {} deleted on the way, {} online-only ones of devices that were away\n{faults} faults, {violations} \
         violations: {}",
        counts.sent,
        counts.accepted,
        counts.refused,
        counts.dead,
        counts.recalls,
        counts.forgotten,
        counts.logins,
        counts.arrivals,
        counts.expired,
        counts.recalled,
        counts.away,
        if violations == 0 { "nothing lost, nothing twice" } else { "NOT in order" },
    );
    if violations > 0 {
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("soak-{seed}"));
        soak.installation.keep_outputs(&folder).await;
        let _ = std::fs::write(folder.join("violations"), soak.broken.lock().unwrap().join("\n"));
        println!("what the processes said: {}", folder.display());
    }
    violations
}
