//! The embedded ledger on disks that fail, fill up and vanish. That it keeps the rules is shown by the differential test.

mod disk;
mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use tokio::task::JoinSet;

use self::disk::Disk;
use self::support::{LEASE, NOW_US, SETTINGS, accepted, app, clock, ids, next, node, reaches, submission, until};
use super::*;
use crate::broadcast::GENERATION_JUMP;
use crate::broadcast::verdict::{Accepted, Decision};

async fn accept(ledger: &EmbeddedLedger, request_id: &str) -> Result<Decision, LedgerError> {
    ledger.accept(&[submission("a", request_id, true)]).await.remove(0)
}

fn open(path: &Path) -> Result<EmbeddedLedger, OpenError> {
    EmbeddedLedger::open(&EmbeddedSettings { path: path.into() }, SETTINGS, clock().1)
}

#[tokio::test]
async fn what_was_answered_survives_a_crash_at_any_write() {
    let disk = Disk::default();
    disk.record.store(true, Ordering::SeqCst);
    let ledger = disk.open(clock().1).unwrap();
    let mut answered = Vec::new();
    for i in 0..8 {
        if i == 4 {
            let recalled = ledger.recall(&app("a"), answered[0]).await.unwrap().unwrap();
            answered.push(recalled.recall_id);
            disk.answered.store(answered.len(), Ordering::SeqCst);
        }
        answered.push(accepted(accept(&ledger, &format!("r{i}")).await).id);
        disk.answered.store(answered.len(), Ordering::SeqCst);
    }
    let images = std::mem::take(&mut *disk.images.lock().unwrap());
    assert!(images.len() > 40, "{}", images.len());
    for (known, image) in images {
        let Ok(ledger) = Disk::of(image).open(clock().1) else {
            // While the file is made it has another name.
            assert_eq!(known, 0);
            continue;
        };
        let snapshot = ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
        let mut expected = answered[..answered.len().min(known + 1)].to_vec();
        if snapshot.head != expected.last().copied().unwrap_or(0) {
            expected.truncate(known);
        }
        assert_eq!(snapshot.head, expected.last().copied().unwrap_or(0));
        if expected.len() > 4 {
            expected.remove(0); // recalled
        }
        assert_eq!(ids(&snapshot.log), expected);
        expected.retain(|id| answered.get(4) != Some(id)); // the recall
        assert_eq!(ids(&snapshot.retained), expected);
        for (i, id) in answered.iter().filter(|id| answered[4] != **id).enumerate() {
            let again = accepted(accept(&ledger, &format!("r{i}")).await);
            let known = expected.contains(id) || (i == 0 && snapshot.head >= answered[0]);
            assert_eq!(again.repeated, known, "request {i}: remembered if and only if it is in the log");
        }
    }
}

#[tokio::test]
async fn what_was_deleted_meanwhile_is_not_written_back() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = open(&folder.path().join("ledger.redb")).unwrap();
    let id = accepted(accept(&ledger, "r1").await).id;
    let known = ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    assert_eq!(ids(&known.retained), [id]);
    // A node that has read the state above writes it back after this.
    let recall = ledger.recall(&app("a"), id).await.unwrap().unwrap();
    assert_eq!(ledger.restore(&app("a"), known.head, &known.retained, &[]).await.unwrap(), 0);
    let now = ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    assert_eq!((ids(&now.retained), now.head), (Vec::new(), recall.recall_id));
}

#[tokio::test]
async fn a_killed_process_leaves_what_it_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.redb");
    if let Some(path) = std::env::var_os("BROADCASTD_TEST_CHILD") {
        // The child of the test below: says each id when it is accepted, until it is killed.
        let ledger = open(Path::new(&path)).unwrap();
        for i in 0.. {
            println!("\nid {}", accepted(accept(&ledger, &format!("r{i}")).await).id);
        }
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "ledger::embedded::tests::a_killed_process_leaves_what_it_said"])
        .env("BROADCASTD_TEST_CHILD", &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while let Some(Ok(line)) = lines.next() {
        said.extend(line.strip_prefix("id ").map(|id| id.parse::<u64>().unwrap()));
        if said.len() == 40 {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert!(said.len() >= 40);
    let ledger = open(&path).unwrap();
    let log = ids(&ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap().log);
    assert_eq!(log[..said.len()], said);
    assert!(log.len() <= said.len() + 1, "no more than the one that was under way");
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_what_was_there() {
    let disk = Disk::default();
    let ledger = disk.open(clock().1).unwrap();
    let mut health = ledger.health();
    let mut feed = ledger.open_feed(&node());
    ledger.subscribe(&app("a")).await.unwrap();
    ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    let first = accepted(accept(&ledger, "r1").await);
    assert!(matches!(next(&mut feed).await, Some(Feed::Published(..))));

    disk.full.store(true, Ordering::SeqCst);
    for i in 0..5 {
        let error = accept(&ledger, &format!("s{i}")).await.unwrap_err();
        assert!(
            error.is_retryable()
                && error.to_string() == "the ledger is unavailable: the disk with the ledger's file is full",
            "{error}"
        );
    }
    assert!(reaches(&mut health, false).await.unwrap_err().contains("is full"));

    disk.full.store(false, Ordering::SeqCst);
    reaches(&mut health, true).await.unwrap();
    // Nothing was published that was refused; but the node is told to look.
    assert!(matches!(next(&mut feed).await, Some(Feed::Interrupted)));
    let snapshot = ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    assert_eq!((ids(&snapshot.log), snapshot.head), (vec![first.id], first.id));
    assert!(accepted(accept(&ledger, "r1").await).repeated);
    assert!(!accepted(accept(&ledger, "s1").await).repeated);
    assert!(matches!(next(&mut feed).await, Some(Feed::Published(..))));
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_is_noticed_by_reading() {
    let disk = Disk::default();
    disk.uncached.store(true, Ordering::SeqCst);
    let ledger = disk.open(clock().1).unwrap();
    let first = accepted(accept(&ledger, "r").await).id;
    let mut health = ledger.health();
    disk.unreadable.store(true, Ordering::SeqCst);
    assert!(ledger.find(&app("a"), first).await.unwrap_err().is_retryable());
    reaches(&mut health, false).await.unwrap_err();
    disk.unreadable.store(false, Ordering::SeqCst);
    reaches(&mut health, true).await.unwrap();
    assert_eq!(ledger.find(&app("a"), first).await.unwrap().unwrap().id, first);
}

#[tokio::test]
async fn what_cannot_be_opened_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.redb");
    let ledger = open(&path).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, OpenError::Locked(_)), "{error}");
    let first = accepted(accept(&ledger, "r1").await);
    drop(ledger);
    assert_eq!(accepted(accept(&open(&path).unwrap(), "r1").await), Accepted { repeated: true, ..first });

    assert!(matches!(open(&folder.path().join("none/ledger.redb")), Err(OpenError::Unusable { .. })));
    assert!(matches!(open(folder.path()), Err(OpenError::Unusable { .. })));
    let unfinished = folder.path().join("other.redb.new");
    std::fs::write(&unfinished, vec![0; 73_728]).unwrap();
    drop(open(&folder.path().join("other.redb")).unwrap());
    assert!(!unfinished.exists());
    let garbage = folder.path().join("garbage");
    std::fs::write(&garbage, vec![7; 100_000]).unwrap();
    let error = open(&garbage).unwrap_err();
    assert!(error.to_string().contains("not a ledger"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_together_share_a_flush_and_all_get_an_answer() {
    let disk = Disk::default();
    let ledger = Arc::new(disk.open(clock().1).unwrap());
    let held = disk.hold();
    let mut waiting = JoinSet::new();
    for i in 0..200 {
        let ledger = ledger.clone();
        waiting.spawn(async move { accepted(accept(&ledger, &format!("r{i}")).await).id });
    }
    until(|| ledger.places.available_permits() == QUEUE - 200).await;
    let before = disk.syncs.load(Ordering::SeqCst);
    drop(held);
    let mut ids = waiting.join_all().await;
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 200);
    let syncs = disk.syncs.load(Ordering::SeqCst) - before;
    assert!(syncs <= 10, "{syncs} flushes");
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_come_in_the_order_of_the_ids() {
    let (_, clock) = clock();
    let ledger = Arc::new(EmbeddedLedger::in_memory(SETTINGS, clock).unwrap());
    let mut feed = ledger.open_feed(&node());
    ledger.subscribe(&app("a")).await.unwrap();
    ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    let mut senders = JoinSet::new();
    for sender in 0..8 {
        let ledger = ledger.clone();
        senders.spawn(async move {
            for i in 0..40 {
                assert_eq!(accepted(accept(&ledger, &format!("r{sender}-{i}")).await).reached, 1);
            }
        });
    }
    let mut last = 0;
    for _ in 0..320 {
        let Some(Feed::Published(_, raw)) = next(&mut feed).await else { panic!("an envelope") };
        let envelope = Envelope::read(&raw).unwrap();
        assert_eq!(envelope.prev, last);
        last = envelope.id;
    }
    senders.join_all().await;
    assert!(feed.try_recv().is_err());
}

#[tokio::test]
async fn nobody_is_told_before_it_is_durable() {
    let disk = Disk::default();
    let ledger = Arc::new(disk.open(clock().1).unwrap());
    let mut feed = ledger.open_feed(&node());
    ledger.subscribe(&app("a")).await.unwrap();
    ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap();
    let syncs = disk.syncs.load(Ordering::SeqCst);
    let held = disk.hold();
    let sender = tokio::spawn({
        let ledger = ledger.clone();
        async move { accepted(accept(&ledger, "r").await) }
    });
    until(|| disk.syncs.load(Ordering::SeqCst) > syncs).await;
    assert!(feed.try_recv().is_err() && !sender.is_finished());
    drop(held);
    sender.await.unwrap();
    assert!(feed.try_recv().is_ok(), "published before the sender is answered");
}

#[tokio::test]
async fn old_request_ids_are_forgotten_and_leave_nothing() {
    let (time, clock) = clock();
    let ledger = EmbeddedLedger::in_memory(SETTINGS, clock).unwrap();
    for i in 0..300 {
        time.fetch_add(1_000_000, Ordering::SeqCst);
        // Every other one is an id that comes again after its time.
        let request_id = if i % 2 == 0 { format!("r{i}") } else { "again".to_owned() };
        let mut submission = submission("a", &request_id, false);
        submission.request.dedupe_ms = 1000;
        assert!(!accepted(ledger.accept(&[submission]).await.remove(0)).repeated);
    }
    let (requests, expiries) = ledger
        .shared
        .view(|view| {
            use redb::ReadableTableMetadata;
            Ok((view.open_table(store::REQUESTS)?.len()?, view.open_table(store::EXPIRIES)?.len()?))
        })
        .unwrap();
    assert_eq!(requests, expiries);
    assert!((30..=70).contains(&requests), "{requests}");
}

#[tokio::test]
async fn the_log_is_bounded_by_length_and_by_age() {
    let (time, clock) = clock();
    let settings = LedgerSettings { log_length: 5, log_hours: 2 };
    let ledger = EmbeddedLedger::in_memory(settings, clock).unwrap();
    let log = async || ids(&ledger.join(&app("a"), &node(), LEASE, 0).await.unwrap().log);
    let mut all = Vec::new();
    for i in 0..8 {
        time.fetch_add(60_000_000, Ordering::SeqCst);
        all.push(accepted(accept(&ledger, &format!("r{i}")).await).id);
    }
    assert_eq!(log().await, all[3..]);
    // A recall takes one out and puts one in.
    let recalled = ledger.recall(&app("a"), all[5]).await.unwrap().unwrap();
    assert_eq!(log().await, [all[3], all[4], all[6], all[7], recalled.recall_id]);
    time.fetch_add(2 * 3_600_000_000, Ordering::SeqCst);
    all.push(accepted(accept(&ledger, "late").await).id);
    assert_eq!(log().await, [all[7], recalled.recall_id, all[8]], "what is not older than two hours");
}

#[tokio::test]
async fn an_unreadable_row_spoils_its_own_app_only() {
    let ledger = EmbeddedLedger::in_memory(SETTINGS, clock().1).unwrap();
    {
        let database = ledger.shared.database.read().unwrap();
        let transaction = database.as_ref().unwrap().begin_write().unwrap();
        transaction.open_table(store::QUOTA).unwrap().insert("a", [1, 2, 3].as_slice()).unwrap();
        transaction.open_table(store::LOG).unwrap().insert(("b", NOW_US), b"{".as_slice()).unwrap();
        transaction.commit().unwrap();
    }
    let decisions = ledger.accept(&[submission("a", "r", true), submission("b", "r", true)]).await;
    assert!(matches!(&decisions[0], Err(error) if !error.is_retryable()));
    let id = accepted(decisions[1].clone()).id;
    assert!(matches!(ledger.find(&app("b"), NOW_US).await, Err(LedgerError::Corrupt(_))));
    assert_eq!(ids(&ledger.join(&app("b"), &node(), LEASE, 0).await.unwrap().log), [id]);
    assert_eq!(ledger.list(&app("b"), 0, 10, Kind::All).await.unwrap().len(), 1);
    assert!(ledger.health().borrow().is_ok());
}

#[tokio::test]
async fn ids_jump_for_the_first_broadcast_and_for_another_generation_only() {
    let (time, clock) = clock();
    let ledger = EmbeddedLedger::in_memory(SETTINGS, clock).unwrap();
    let id = async |request_id: &str| accepted(accept(&ledger, request_id).await).id;
    let first = id("1").await;
    assert_eq!(first, NOW_US + GENERATION_JUMP);
    assert_eq!(id("2").await, first + 1);
    let old = ledger.generation();
    ledger.set_generation("another");
    time.fetch_add(1_000_000, Ordering::SeqCst);
    assert_eq!(id("3").await, NOW_US + 1_000_000 + GENERATION_JUMP);
    ledger.set_generation(&old.0);
    assert_eq!(id("4").await, NOW_US + 1_000_001 + GENERATION_JUMP);
    ledger.set_generation("third");
    time.fetch_add(1_000_000, Ordering::SeqCst);
    assert_eq!(id("5").await, NOW_US + 2_000_000 + GENERATION_JUMP);
}

#[tokio::test]
async fn a_clock_that_steps_back_brings_no_request_id_to_life() {
    let (time, clock) = clock();
    let ledger = EmbeddedLedger::in_memory(SETTINGS, clock).unwrap();
    let mut first = submission("a", "r1", false);
    first.request.dedupe_ms = 1000;
    let batch = [first];
    let id = accepted(ledger.accept(&batch).await.remove(0)).id;
    time.fetch_add(2_000_000, Ordering::SeqCst);
    accepted(accept(&ledger, "r2").await);
    time.fetch_sub(1_500_000, Ordering::SeqCst);
    let again = accepted(ledger.accept(&batch).await.remove(0));
    assert_eq!((again.id, again.repeated), (id, true));
}
