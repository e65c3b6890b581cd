//! The demo's script, run against a standalone server that was started for it: real devices, the real API.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::call::Caller;
use super::device::{Broadcast, Device, Happening, Login};
use super::{print_line, printable, token};
use crate::api::nim::Call;
use crate::broadcast::BroadcastId;

/// Nothing on one machine takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What devices may report before they wait for the script to read it.
const REPORTS: usize = 256;

/// The devices: account, what it is, platform. The last one comes later.
const DEVICES: [(&str, &str, &str); 5] = [
    ("ada", "phone", "ios"),
    ("ada", "browser", "web"),
    ("ada", "laptop", "mac"),
    ("bo", "phone", "aos"),
    ("bo", "desktop", "pc"),
];
const LATE: (&str, &str, &str) = ("bo", "browser", "web");

/// The server that the demo runs against.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Its public address: API, WebSocket and console.
    pub address: SocketAddr,
    /// The app's key.
    pub app: String,
    /// The app's secret.
    pub secret: SecretString,
}

/// A report of a device: which one, when, what.
struct Report {
    device: usize,
    at: Instant,
    happening: Happening,
}

/// Plays the script, then prints what arrives until `shutdown`.
///
/// # Errors
/// If a step does not happen as it should; the sentence says which.
pub async fn run(stage: Stage, shutdown: CancellationToken) -> anyhow::Result<()> {
    let (sender, mut reports) = mpsc::channel(REPORTS);
    let devices = CancellationToken::new();
    let _stop_devices = devices.clone().drop_guard();
    let script = async {
        play(&stage, &sender, &mut reports, &devices).await?;
        follow(&mut reports).await
    };
    tokio::select! {
        ended = script => ended,
        () = shutdown.cancelled() => Ok(()),
    }
}

async fn play(
    stage: &Stage,
    sender: &mpsc::Sender<Report>,
    reports: &mut mpsc::Receiver<Report>,
    devices: &CancellationToken,
) -> anyhow::Result<()> {
    say("broadcastd demo: api, ledger and node in one process, on this machine only")?;
    say("")?;
    for (index, who) in DEVICES.iter().enumerate() {
        start(stage, index, *who, sender.clone(), devices.clone())?;
    }
    let mut online = [false; DEVICES.len()];
    while online.contains(&false) {
        let report = next(reports, "a device did not log in").await?;
        if let (Happening::Welcome(_), Some(online)) = (&report.happening, online.get_mut(report.device)) {
            *online = true;
        }
    }
    say("5 devices of 2 accounts are online, each by a WebSocket of its own.")?;
    say("")?;

    let body = "Hello, every device!";
    let sent = Instant::now();
    let answer = send(stage, body).await?;
    let id = answer["msg"]["broadcastId"].as_u64().context("the server accepted it without an id")?;
    say(&format!("POST /nimserver/msg/broadcastMsg.action  body={body:?} isOffline=true"))?;
    say(&format!("  -> code 200, broadcastId {id}, {:.1} ms", sent.elapsed().as_secs_f64() * 1000.0))?;
    say("")?;
    let mut missing = DEVICES.len();
    while missing > 0 {
        let report = next(reports, "a device did not get the broadcast").await?;
        if let Some(broadcast) = is(&report, id) {
            say(&arrival(&report, broadcast, &format!("{:.1} ms", millis(sent, report.at))))?;
            missing -= 1;
        }
    }
    say("")?;

    say("Now a device that was offline meanwhile logs in. The broadcast was kept for it (isOffline):")?;
    let connected = Instant::now();
    start(stage, DEVICES.len(), LATE, sender.clone(), devices.clone())?;
    loop {
        let report = next(reports, "the late device did not get the broadcast").await?;
        if let Some(broadcast) = is(&report, id).filter(|_| report.device == DEVICES.len()) {
            let when = format!("{:.1} ms after it began to connect", millis(connected, report.at));
            say(&arrival(&report, broadcast, &when))?;
            break;
        }
    }
    say("")?;
    say(
        "An app may send 10 broadcasts in any minute and 1000 a day (a setting). The 11th within a minute is answered",
    )?;
    say("code 416 with the seconds to wait, and changes nothing. Try it: run this a few times (bash).")?;
    say("")?;
    say(&curl(stage))?;
    say("")?;
    say(&format!("A device in your browser:  http://{}/", stage.address))?;
    say(&format!("A device in a terminal:    broadcastd listen --url ws://{}/ws", stage.address))?;
    say("What arrives is shown below. Ctrl-C ends it.")?;
    say("")
}

/// Shows what arrives, for as long as somebody reads it.
async fn follow(reports: &mut mpsc::Receiver<Report>) -> anyhow::Result<()> {
    while let Some(report) = reports.recv().await {
        match &report.happening {
            Happening::Broadcast(broadcast) => say(&arrival(&report, broadcast, "now"))?,
            Happening::Recall(id) => say(&format!("  {}  broadcast {id} was recalled", name(report.device)))?,
            Happening::Away(why, _) => say(&format!("  {}  {}", name(report.device), printable(why)))?,
            Happening::Welcome(_) => {}
        }
    }
    Ok(())
}

fn start(
    stage: &Stage,
    index: usize,
    (account, what, platform): (&str, &str, &str),
    sender: mpsc::Sender<Report>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let token = token::mint(&stage.app, &stage.secret, account, Duration::from_secs(7 * 86_400))?;
    let mut device = Device::new(Login {
        url: format!("ws://{}/ws", stage.address),
        app: stage.app.clone(),
        account: account.to_owned(),
        device: format!("demo-{account}-{what}"),
        platform: platform.to_owned(),
        token: Some(token),
        since: 0,
    });
    tokio::spawn(stop.run_until_cancelled_owned(async move {
        loop {
            let happening = match device.next().await {
                Ok(happening) => happening,
                Err(refused) => Happening::Away(refused.to_string(), Duration::MAX),
            };
            let over = matches!(happening, Happening::Away(_, Duration::MAX));
            if sender.send(Report { device: index, at: Instant::now(), happening }).await.is_err() || over {
                return;
            }
        }
    }));
    Ok(())
}

async fn send(stage: &Stage, body: &str) -> anyhow::Result<Value> {
    let caller =
        Caller { url: format!("http://{}", stage.address), app: stage.app.clone(), secret: stage.secret.clone() };
    let parameters = vec![
        ("body", body.to_owned()),
        ("from", "demo".to_owned()),
        ("isOffline", "true".to_owned()),
        ("ttl", "1".to_owned()),
    ];
    let answer = caller.call(Call::Broadcast.path(), parameters).await?;
    if answer["code"] != 200 {
        bail!("the server did not accept the demo's broadcast: {}", printable(&answer.to_string()));
    }
    Ok(answer)
}

/// The next report; `problem` is what is wrong if none comes.
async fn next(reports: &mut mpsc::Receiver<Report>, problem: &str) -> anyhow::Result<Report> {
    let report = timeout(PATIENCE, reports.recv()).await.ok().flatten().with_context(|| problem.to_owned())?;
    if let Happening::Away(why, _) = &report.happening {
        bail!("{problem}: {}", printable(why));
    }
    Ok(report)
}

/// The broadcast of this id, if the report is of it.
fn is(report: &Report, id: BroadcastId) -> Option<&Broadcast> {
    match &report.happening {
        Happening::Broadcast(broadcast) if broadcast.id == id => Some(broadcast),
        _ => None,
    }
}

fn name(device: usize) -> String {
    let (account, what, platform) = DEVICES.get(device).copied().unwrap_or(LATE);
    format!("{account:<4}{what:<9}{platform:<5}")
}

fn arrival(report: &Report, broadcast: &Broadcast, when: &str) -> String {
    format!("  {}{:>8}   {}", name(report.device), when, printable(&broadcast.content))
}

fn millis(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
}

/// A signed call for the reader's shell.
fn curl(stage: &Stage) -> String {
    format!(
        r#"  SECRET='{secret}'; NONCE=$(date +%s%N); CURTIME=$(date +%s)
  CHECKSUM=$(printf %s "$SECRET$NONCE$CURTIME" | sha1sum | cut -d' ' -f1)
  curl -s http://{address}{path} \
    -H "AppKey: {app}" -H "Nonce: $NONCE" -H "CurTime: $CURTIME" -H "CheckSum: $CHECKSUM" \
    --data-urlencode 'body=Hello from my shell' -d isOffline=true"#,
        // Only ever the demo's own secret, which everybody knows.
        secret = stage.secret.expose_secret(),
        address = stage.address,
        path = Call::Broadcast.path(),
        app = stage.app,
    )
}

fn say(line: &str) -> anyhow::Result<()> {
    if print_line(line)? { Ok(()) } else { bail!("nobody reads the demo's output any more") }
}
