//! The embedded store when its disk is full or read-only (row 39), and when its process is killed (row 40).

use std::process::Command;

use futures_util::future::join_all;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::support::after_row::after_row_without_redis;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::Api;
use crate::support::{SOON, unique, until};

fn standalone(app: &App) -> Process {
    // Soon after the disk is whole again a call that waits is to get through, and one that cannot is to be told.
    Process::new("standalone", std::slice::from_ref(app))
        .with("embedded.path", "store.redb")
        .with("api.reply_timeout_ms", "1500")
}

fn a_request(body: &str) -> Value {
    json!({ "requestId": unique("embedded"), "body": body })
}

/// Asks for a retained broadcast; an error if the process did not answer.
async fn ask(process: &Process, app: &App, request: &Value) -> Result<Value, String> {
    let text = |name: &str| request[name].as_str().unwrap();
    let form = [("body", text("body")), ("isOffline", "true"), ("requestId", text("requestId"))];
    let (status, answer) = Api::new(&process.api_url(), app).try_call("msg/broadcastMsg.action", &form).await?;
    assert_eq!(status, 200, "{answer}");
    Ok(answer)
}

/// 4096 characters, so that the file has to grow soon.
fn long_body(number: usize) -> String {
    format!("{number:04096}")
}

/// What was accepted is there: by its id, and for a new device. Of what was left open nothing is assumed.
async fn assert_intact(process: &Process, app: &App, accepted: &[(Value, Value)]) {
    let sender = Api::new(&process.api_url(), app);
    for (request, answer) in accepted {
        let id = answer["msg"]["broadcastId"].to_string();
        let found = sender.call("history/queryBroadcastMsgById.action", &[("broadcastId", &id)]).await;
        assert_eq!(found["msg"]["body"], request["body"], "{found}");
    }
    let mut device = Device::online(app, "web", &process.device_url()).await;
    device.collect(accepted.len().min(100), SOON).await;
    let had: Vec<(Value, Value)> =
        device.history().iter().map(|arrival| (json!(arrival.id), json!(arrival.content))).collect();
    // Those whose outcome was unknown may be among the newest 100.
    let newest = &accepted[accepted.len().saturating_sub(100).saturating_add(3).min(accepted.len() - 1)..];
    for (request, answer) in newest {
        assert!(had.contains(&(answer["msg"]["broadcastId"].clone(), request["body"].clone())), "{answer} is gone");
    }
}

/// Fills the disk by broadcasts until one is not accepted; then frees it by `free`, and asks again for what was left open.
async fn fill_and_free(process: &Process, app: &App, device: &mut Device, free: impl AsyncFnOnce()) {
    let mut accepted = Vec::new();
    let mut open = Vec::new();
    for number in 0..2000 {
        let request = a_request(&long_body(number));
        let answer = ask(process, app, &request).await.unwrap();
        if answer["code"] == 200 {
            accepted.push((request, answer));
            // Else, if this takes long, it counts as away, and is owed only what is retained.
            device.follow(&[process.device_url()], accepted.len(), SOON).await;
            continue;
        }
        // Asked for until the reply timeout: the outcome is unknown, and the id says which to ask again. Never asked for,
        // be it that its signature could not be remembered: nothing was sent.
        assert!(
            answer["code"] == 503 || answer["code"] == 500 && answer["requestId"] == request["requestId"],
            "{answer}"
        );
        open.push(request);
        if open.len() == 3 {
            break;
        }
    }
    println!("{} broadcasts fitted", accepted.len());
    assert!(open.len() == 3 && accepted.len() > 3, "it was not filled: {} accepted", accepted.len());
    let said = process.output();
    let sentences = ["disk with the ledger's file is full", "limit on the size of files"];
    assert!(sentences.iter().any(|sentence| said.contains(sentence)), "the log does not say why: {said}");
    assert!(!said.contains("panicked"), "{said}");
    let sender = Api::new(&process.api_url(), app);
    for (request, answer) in accepted.iter().take(20) {
        // While the file cannot even be reopened there is nothing to read; "not found" it must never be.
        let id = answer["msg"]["broadcastId"].to_string();
        let found = sender.call("history/queryBroadcastMsgById.action", &[("broadcastId", &id)]).await;
        assert!(found["code"] == 503 || found["msg"]["body"] == request["body"], "{found}");
    }

    free().await;
    until("accepting again", SOON, async || match ask(process, app, &open[0]).await {
        Ok(answer) if answer["code"] == 200 => Ok(()),
        Ok(answer) => Err(answer.to_string()),
        Err(error) => Err(error),
    })
    .await;
    assert_intact(process, app, &accepted).await;
    let mut checker = Checker::default();
    for (request, answer) in &accepted {
        checker.verdict(request, answer).unwrap();
        checker.verdict(request, &ask(process, app, request).await.unwrap()).unwrap();
    }
    for request in &open {
        let answer = ask(process, app, request).await.unwrap();
        checker.all_accepted(std::slice::from_ref(request), &[answer]);
    }
    // Nobody has read its socket meanwhile: it may have been sent away, and comes back with its cursor.
    device.follow(&[process.device_url()], checker.accepted(), SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    let (status, body) = process.readiness().await.unwrap();
    assert_eq!(status, 200, "{body}");
    after_row_without_redis(std::slice::from_ref(app));
}

/// Row 39, with the limit that a supervisor can set (`LimitFSIZE=`): it needs no rights, and the kernel would kill a process
/// that has not provided for it.
#[tokio::test]
async fn at_the_limit_of_its_files_size_it_refuses_keeps_and_recovers() {
    let app = App::unlimited();
    let process = standalone(&app).start().await;
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    let pid = Pid::from_raw(i32::try_from(process.pid()).unwrap());
    let size = std::fs::metadata(process.folder().join("store.redb")).unwrap().len();
    let limit = |current| prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).map(drop).unwrap();
    limit(Some(size + (2 << 20)));
    fill_and_free(&process, &app, &mut device, async || limit(None)).await;
}

fn mounts(wrapper: &[&str]) -> bool {
    Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output().is_ok_and(|output| output.status.success())
}

/// Row 39, with a small file system of its own that is really full. Where mounting is not allowed the test above is all; where
/// the tests are relied on (`CI`), that is a failure, so that nobody takes for tried what was not.
#[tokio::test]
async fn on_a_full_disk_it_refuses_keeps_and_recovers() {
    const OWN_DISK: [&str; 5] =
        ["unshare", "-rm", "sh", "-c", "mkdir -p disk && mount -t tmpfs -o size=4m tmpfs disk && exec \"$0\" \"$@\""];
    let app = App::unlimited();
    let scratch = tempfile::tempdir().unwrap();
    let probe = format!("cd {} && {}", scratch.path().display(), OWN_DISK[4]);
    if !mounts(&["unshare", "-rm", "sh", "-c", &probe]) {
        let why =
            "not tried: this machine lets nobody mount a file system of his own (a container needs CAP_SYS_ADMIN)";
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("{why}");
        return;
    }
    let process = standalone(&app).by(&OWN_DISK).with("embedded.path", "disk/store.redb").start().await;
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    let grow = async || {
        let pid = process.pid().to_string();
        let disk = process.folder().join("disk");
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid, "-U", "--preserve-credentials", "-m", "mount", "-o", "remount,size=64m"]).arg(disk);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    fill_and_free(&process, &app, &mut device, grow).await;
}

/// Row 39: it does not start on a file that it may not write, says so, and what is in the file is none the worse.
#[tokio::test]
async fn on_a_read_only_file_it_does_not_start_and_says_why() {
    let app = App::unlimited();
    let mut process = standalone(&app).start().await;
    let mut accepted = Vec::new();
    for number in 0..20 {
        let request = a_request(&format!("number {number}"));
        let answer = ask(&process, &app, &request).await.unwrap();
        assert_eq!(answer["code"], 200, "{answer}");
        accepted.push((request, answer));
    }
    process.drain(SOON).await;
    let file = process.folder().join("store.redb");
    let before = std::fs::read(&file).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let mut permissions = std::fs::metadata(&file).unwrap().permissions();
    if is_root {
        // Permissions do not bind root: a read-only mount does.
        const READ_ONLY: &str =
            "mount --bind store.redb store.redb && mount -o remount,bind,ro store.redb && exec \"$0\" \"$@\"";
        process = process.by(&["unshare", "-m", "sh", "-c", READ_ONLY]);
    } else {
        permissions.set_readonly(true);
        std::fs::set_permissions(&file, permissions.clone()).unwrap();
    }
    let said_before = process.output().len();
    process.spawn();
    let status = process.wait(SOON).await;
    let said = process.output()[said_before..].to_owned();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("store.redb") && (said.contains("read-only") || said.contains("denied")), "{said}");
    assert_eq!(std::fs::read(&file).unwrap(), before, "not a byte was changed");
    if !is_root {
        #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test, in a folder of its own")]
        permissions.set_readonly(false);
        std::fs::set_permissions(&file, permissions).unwrap();
    }
    process = process.by(&[]).start().await;
    assert_intact(&process, &app, &accepted).await;
    after_row_without_redis(std::slice::from_ref(&app));
}

/// Row 40: killed while a group is written but not committed, when it is committed and nobody was told, and at random moments,
/// always under load.
#[tokio::test]
async fn killed_around_the_commit_it_keeps_what_it_accepted_and_forgets_what_it_had_not() {
    let app = App::unlimited();
    let mut process = standalone(&app).start().await;
    let urls = [process.device_url()];
    let mut device = Device::online(&app, "web", &urls[0]).await;
    let mut checker = Checker::default();
    process.drain(SOON).await;
    let faults = ["embedded::before-commit=3*off->return(kill)", "embedded::after-commit=3*off->return(kill)", ""];
    for round in 0..2 * faults.len() {
        let fault = faults[round % faults.len()];
        process = process.failpoints(fault);
        process.restart().await;
        let requests: Vec<Value> =
            (0..40).map(|number| a_request(&format!("round {round}, number {number}"))).collect();
        let killed = tokio::sync::Mutex::new(&mut process);
        let (url, apps) = (killed.lock().await.api_url(), app.clone());
        let send = async |request: &Value| {
            let form = [
                ("body", request["body"].as_str().unwrap()),
                ("isOffline", "true"),
                ("requestId", request["requestId"].as_str().unwrap()),
            ];
            Api::new(&url, &apps).try_call("msg/broadcastMsg.action", &form).await
        };
        let answered = std::sync::atomic::AtomicUsize::new(0);
        // Eight at a time: while some are answered, others are under way.
        let sending = join_all(requests.chunks(5).map(async |some| {
            let mut answers = Vec::new();
            for request in some {
                answers.push(send(request).await);
                answered.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
            answers
        }));
        let killing = async {
            if fault.is_empty() {
                let enough = 5 + 10 * round;
                until("some answers", SOON, async || match answered.load(std::sync::atomic::Ordering::Relaxed) {
                    answered if answered >= enough.min(30) => Ok(()),
                    answered => Err(answered),
                })
                .await;
                killed.lock().await.kill();
            } else {
                let status = killed.lock().await.wait_killed().await;
                assert_eq!(status.code(), None, "killed by a signal");
            }
        };
        let (answers, ()) = tokio::join!(sending, killing);
        let mut open = 0;
        for (request, answer) in requests.iter().zip(answers.into_iter().flatten()) {
            match answer {
                Ok((200, answer)) if answer["code"] == 200 => checker.verdict(request, &answer).unwrap(),
                Ok((_, answer)) => panic!("{answer}"),
                Err(_) => open += 1,
            }
        }
        println!("{fault:45} {} answered, {open} not", requests.len() - open);
        assert!(open > 0, "it was killed too late to leave anything open");
        process.without_failpoints();
        process.restart().await;
        // What was accepted has its verdict still; what was open is decided now, or was, untold.
        for request in &requests {
            let answer = ask(&process, &app, request).await.unwrap();
            checker.all_accepted(std::slice::from_ref(request), &[answer]);
        }
        device.follow(&urls, checker.accepted(), SOON).await;
        checker.device(device.history(), Must::Everything, 0).unwrap();
        process.drain(SOON).await;
    }
    after_row_without_redis(std::slice::from_ref(&app));
}
