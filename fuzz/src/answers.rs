//! A Redis server's answer (RESP) to a script.

use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::Envelope;
use broadcastd::broadcast::verdict::Decision;
use broadcastd::broadcast::{MAX_ID, platform::Platform};
use broadcastd::fuzzing::{self, App, Rows, Update};
use broadcastd::ledger::{Generation, LedgerError, Snapshot, Stored};

use super::envelope::{BOUNDS, check};

pub fn run(data: &[u8]) {
    let Some(answers) = fuzzing::answers(data) else { return };
    match answers.decision {
        Ok(Decision::Accepted(accepted)) => {
            assert!((1..=MAX_ID).contains(&accepted.id));
            assert!(accepted.expires_ms == 0 || accepted.expires_ms > accepted.time_ms);
        }
        Ok(Decision::Refused(refusal)) => assert!(refusal.retry_after >= 1),
        Ok(Decision::Conflict) => {}
        Err(error) => check_error(&error),
    }
    match answers.renewal {
        Ok((_, head)) => assert!(head <= u64::MAX / 2, "Redis' integers are signed"),
        Err(error) => check_error(&error),
    }
    let Rows { now_ms, head, log, retained } = match answers.snapshot {
        Ok(rows) => rows,
        Err(error) => return check_error(&error),
    };
    let read = |rows: Vec<std::sync::Arc<[u8]>>| -> Vec<Stored> {
        let rows = rows.into_iter().filter_map(|raw| Some(Stored { envelope: Envelope::read(&raw).ok()?, raw }));
        rows.inspect(|row| check(&row.envelope, &row.raw)).collect()
    };
    let snapshot = Snapshot {
        now_ms,
        head,
        generation: Generation("g".into()),
        log: read(log),
        retained: read(retained),
        logged: None,
    };
    let mut app = App::new(AppKey::parse("demo").expect("a key"), 1);
    for _ in 0..2 {
        app.start_reading();
        let (update, _) = app.take(snapshot.clone(), BOUNDS, 1);
        // Whatever the ledger holds, what is sent is in order and not sent again.
        if let Update::Append(entries) | Update::Replace(entries) = &update {
            assert!(entries.is_empty(), "the second reading brings nothing new");
        }
        let timeline = app.timeline.as_ref().expect("open");
        for platform in Platform::ALL {
            let (reader, _) = timeline.admit(0, platform, now_ms, 60_000);
            let ids: Vec<u64> = timeline.after(reader, now_ms).map(|entry| entry.id).collect();
            assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(
                timeline.after(reader, now_ms).all(|entry| entry.targets.contains(platform) && !entry.expired(now_ms))
            );
        }
    }
}

fn check_error(error: &LedgerError) {
    assert!(!error.is_retryable(), "asking again would bring the same");
}
