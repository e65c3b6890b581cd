use super::*;
use crate::broadcast::retention::MAX_RETAINED;
use crate::node::entry::tests::{broadcast, recall};
use proptest::prelude::*;

const BOUNDS: Bounds = Bounds { frames: 1024, bytes: 1 << 20 };
const NOW: u64 = 1_000_000;
const LATER: u64 = NOW + 1_000_000;

fn ids<'a>(entries: impl Iterator<Item = &'a Arc<Entry>>) -> Vec<u64> {
    entries.map(|entry| entry.id).collect()
}

fn new_device(timeline: &Timeline, since: u64) -> (Reader, usize) {
    timeline.admit(since, Platform::Web, NOW, 60_000)
}

#[test]
fn the_next_is_appended_the_known_dropped_and_the_gap_seen() {
    let mut timeline = Timeline::new(BOUNDS, 10);
    assert_eq!(timeline.fit(10, 9), Fit::Known);
    assert_eq!(timeline.fit(12, 11), Fit::Gap);
    assert_eq!(timeline.fit(12, 10), Fit::Next);
    // After the ledger lost its newest entries, `prev` lies before what the node has seen: no gap.
    assert_eq!(timeline.fit(99, 5), Fit::Next);
    timeline.append(broadcast(12, 10, NOW, 0), NOW);
    assert_eq!(timeline.last(), 12);
}

#[test]
fn a_new_device_gets_what_is_retained_and_then_everything() {
    let log = vec![broadcast(1, 0, NOW, LATER), broadcast(2, 1, NOW, 0), broadcast(3, 2, NOW, NOW)];
    let mut timeline = Timeline::open(BOUNDS, 3, log.clone(), vec![log[0].clone()], NOW);
    let (reader, pending) = new_device(&timeline, 0);
    assert_eq!((reader.login_head, pending), (3, 1));
    timeline.append(broadcast(4, 3, NOW, 0), NOW);
    assert_eq!(ids(timeline.after(reader, NOW)), [1, 4]);
    // One that expires meanwhile is not sent any more.
    assert_eq!(ids(timeline.after(reader, LATER)), [4]);
}

#[test]
fn a_device_that_comes_back_soon_also_gets_what_was_for_online_devices() {
    let log = vec![
        broadcast(1, 0, NOW - 90_000, 0),
        broadcast(2, 1, NOW - 50_000, 0),
        broadcast(3, 2, NOW - 40_000, LATER),
        broadcast(4, 3, NOW - 30_000, 0),
        recall(5, 4, NOW - 20_000, 99),
    ];
    let timeline = Timeline::open(BOUNDS, 5, log.clone(), vec![log[2].clone()], NOW);
    let (reader, pending) = new_device(&timeline, 1);
    assert_eq!(ids(timeline.after(reader, NOW)), [2, 3, 4, 5]);
    assert_eq!(pending, 3, "a recall is not a broadcast");
    assert_eq!(ids(timeline.after(new_device(&timeline, 3).0, NOW)), [4, 5]);
    assert_eq!(ids(timeline.after(new_device(&timeline, 0).0, NOW)), [3]);
}

#[test]
fn it_is_known_when_a_device_that_comes_back_soon_does_not_get_everything() {
    // Ids as the ledger makes them: microseconds.
    let id = |second: u64| -> u64 { (NOW + second * 1000) * 1000 };
    let mut timeline = Timeline::new(Bounds { frames: 2, ..BOUNDS }, id(0));
    for second in 1..=4 {
        timeline.append(broadcast(id(second), id(second - 1), NOW + second * 1000, 0), NOW);
    }
    let short = |since: u64, seconds_later: u64| timeline.resumes_short(since, NOW + seconds_later * 1000, 60_000);
    assert!(short(id(1), 5), "the second is gone");
    assert!(!short(id(2), 5) && !short(id(4), 5), "has had what is gone");
    assert!(!short(0, 5), "a new device is not owed it");
    assert!(!short(id(1), 62), "nor one that was away for too long");
}

#[test]
fn a_cursor_beyond_the_head_is_kept() {
    let mut timeline = Timeline::open(BOUNDS, 5, vec![], vec![], NOW);
    let (reader, pending) = new_device(&timeline, 50);
    assert_eq!((reader.cursor, reader.login_head, pending), (50, 50, 0));
    timeline.append(broadcast(40, 5, NOW, 0), NOW);
    timeline.append(broadcast(60, 40, NOW, 0), NOW);
    assert_eq!(ids(timeline.after(reader, NOW)), [60]);
}

#[test]
fn what_is_recalled_is_not_delivered_any_more() {
    let mut timeline = Timeline::new(BOUNDS, 0);
    let early = new_device(&timeline, 0).0;
    timeline.append(broadcast(1, 0, NOW, LATER), NOW);
    timeline.append(broadcast(2, 1, NOW, 0), NOW);
    timeline.append(recall(3, 2, NOW, 1), NOW);
    assert_eq!(ids(timeline.after(early, NOW)), [2, 3]);
    assert_eq!(new_device(&timeline, 0).1, 0);
    assert_eq!(timeline.recalled(), [1]);
}

#[test]
fn only_its_platforms_get_it() {
    let raw: Arc<[u8]> =
        br#"{"v":1,"id":1,"prev":0,"time":1,"expires":0,"body":"x","targetOs":["ios"]}"#.as_slice().into();
    let entry = Entry::new(crate::broadcast::envelope::Envelope::read(&raw).unwrap(), &raw, 1);
    let mut timeline = Timeline::new(BOUNDS, 0);
    let web = new_device(&timeline, 0).0;
    timeline.append(Arc::new(entry), NOW);
    assert_eq!(timeline.after(web, NOW).count(), 0);
    assert_eq!(timeline.after(Reader { platform: Platform::Ios, ..web }, NOW).count(), 1);
}

#[test]
fn who_is_behind_the_window_is_noticed() {
    let bounds = Bounds { frames: 2, bytes: 1 << 20 };
    let mut timeline = Timeline::new(bounds, 0);
    let early = new_device(&timeline, 0).0;
    timeline.append(broadcast(1, 0, NOW, 0), NOW);
    timeline.append(broadcast(2, 1, NOW, 0), NOW);
    assert!(!timeline.has_left_behind(early));
    timeline.append(broadcast(3, 2, NOW, 0), NOW);
    assert!(timeline.has_left_behind(early));
    assert!(!timeline.has_left_behind(Reader { cursor: 1, ..early }));
    let mut small = Timeline::new(Bounds { frames: 10, bytes: 1 }, 0);
    small.append(broadcast(1, 0, NOW, 0), NOW);
    small.append(broadcast(2, 1, NOW, 0), NOW);
    assert_eq!(small.recent.len(), 1, "the newest stays, however small the window");
}

#[test]
fn one_that_resumes_is_behind_when_what_it_resumes_with_is_gone() {
    let bounds = Bounds { frames: 2, bytes: 1 << 20 };
    let log = vec![broadcast(1, 0, NOW, 0), broadcast(2, 1, NOW, 0)];
    let mut timeline = Timeline::open(bounds, 2, log, vec![], NOW);
    let (resuming, _) = timeline.admit(1, Platform::Web, NOW, 60_000);
    timeline.append(broadcast(3, 2, NOW, 0), NOW);
    assert!(!timeline.has_left_behind(resuming));
    timeline.append(broadcast(4, 3, NOW, 0), NOW);
    assert!(timeline.has_left_behind(resuming), "2 is gone");
    assert!(!timeline.has_left_behind(Reader { cursor: 2, ..resuming }));
    assert!(!timeline.has_left_behind(Reader { resume_from: u64::MAX, ..resuming }), "2 was not for it");
}

#[test]
fn portions_keep_to_their_bounds() {
    let entries: Vec<_> = (1..=7).map(|id| broadcast(id, id - 1, NOW, 0)).collect();
    let size = entries[0].frame.len();
    let sizes = |frames, bytes| -> Vec<usize> { Bounds { frames, bytes }.split(&entries).map(<[_]>::len).collect() };
    assert_eq!(sizes(3, 1 << 20), [3, 3, 1]);
    assert_eq!(sizes(100, size * 2), [2, 2, 2, 1]);
    assert_eq!(sizes(0, 0), [1; 7]);
    assert_eq!(Bounds { frames: 3, bytes: 0 }.split(&[]).count(), 0);
}

#[test]
fn a_trimmed_log_gives_what_is_retained_and_counts_the_rest() {
    let mut timeline = Timeline::new(BOUNDS, 10);
    timeline.append(broadcast(11, 10, NOW, LATER), NOW);
    let log = vec![broadcast(20, 19, NOW, 0)];
    let retained = vec![broadcast(15, 14, NOW, LATER)];
    let result = timeline.backfill(log, retained, 21, true, NOW);
    assert_eq!(ids(result.added.iter()), [15, 20]);
    assert_eq!(result.lost, 3, "before 15, before 20, and 21");
    assert_eq!(timeline.last(), 21);
    assert!(result.replaced);
    // 11 is not retained any more: its recall was among the lost.
    assert_eq!(ids(timeline.retained(NOW)), [15]);
}

#[test]
fn what_another_node_wrote_back_is_taken_over_but_nothing_recalled() {
    let mut timeline = Timeline::new(BOUNDS, 10);
    timeline.append(broadcast(11, 10, NOW, LATER), NOW);
    timeline.append(recall(12, 11, NOW, 7), NOW);
    let retained = vec![broadcast(5, 4, NOW, LATER), broadcast(7, 6, NOW, LATER)];
    let result = timeline.backfill(vec![], retained, 12, false, NOW);
    assert_eq!((result.added.len(), result.lost, result.replaced), (0, 0, true));
    // 11 stays: the ledger has lost it, and gets it back.
    assert_eq!(ids(timeline.retained(NOW)), [5, 11]);
}

/// What becomes of a published envelope.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Arrives,
    Lost,
    Twice,
    /// After the one that follows it.
    Late,
    /// The node restarts before it.
    Restart,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Arrives), 2 => Just(Fate::Lost), 1 => Just(Fate::Twice), 1 => Just(Fate::Late), 1 => Just(Fate::Restart)
    ]
}

/// The node's part: merges one envelope, reading the log where there is a gap.
fn receive(timeline: &mut Timeline, entry: &Arc<Entry>, log: &[Arc<Entry>], seen: &mut Vec<u64>) {
    match timeline.fit(entry.id, entry.prev) {
        Fit::Known => {}
        Fit::Next => {
            timeline.append(entry.clone(), NOW);
            seen.push(entry.id);
        }
        Fit::Gap => catch_up(timeline, log, seen),
    }
}

fn catch_up(timeline: &mut Timeline, log: &[Arc<Entry>], seen: &mut Vec<u64>) {
    let after = log.iter().filter(|entry| entry.id > timeline.last()).cloned().collect();
    let head = log.last().map_or(0, |entry| entry.id);
    let result = timeline.backfill(after, retained_of(log), head, true, NOW);
    assert_eq!(result.lost, 0);
    seen.extend(result.added.iter().map(|entry| entry.id));
}

/// The ledger's part: what is retained at the end of a log.
fn retained_of(log: &[Arc<Entry>]) -> Vec<Arc<Entry>> {
    let mut retained: Vec<Arc<Entry>> = Vec::new();
    for entry in log {
        match entry.recalls {
            Some(target) => retained.retain(|entry| entry.id != target),
            None if entry.expires_ms > NOW => retained.push(entry.clone()),
            None => {}
        }
        let extra = retained.len().saturating_sub(MAX_RETAINED);
        retained.drain(..extra);
    }
    retained
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_lost_doubled_or_late_the_timeline_ends_as_the_log(
        steps in proptest::collection::vec((fate(), any::<bool>(), proptest::option::weighted(0.1, any::<prop::sample::Index>())), 1..250),
        small_window: bool,
    ) {
        let bounds = if small_window { Bounds { frames: 4, ..BOUNDS } } else { BOUNDS };
        let mut timeline = Timeline::new(bounds, 0);
        let mut log: Vec<Arc<Entry>> = Vec::new();
        let mut seen = Vec::new();
        let mut late: Option<Arc<Entry>> = None;
        for (step, (fate, retain, recalled)) in steps.into_iter().enumerate() {
            let id = step as u64 * 3 + 1;
            let prev = log.last().map_or(0, |entry| entry.id);
            let entry = match recalled {
                Some(index) if !log.is_empty() => recall(id, prev, NOW, log[index.index(log.len())].id),
                _ => broadcast(id, prev, NOW, if retain { LATER } else { 0 }),
            };
            log.push(entry.clone());
            let held_back = late.take();
            match fate {
                Fate::Lost => {}
                Fate::Late => late = Some(entry),
                Fate::Arrives => receive(&mut timeline, &entry, &log, &mut seen),
                Fate::Twice => for _ in 0..2 { receive(&mut timeline, &entry, &log, &mut seen) },
                Fate::Restart => {
                    // Its devices reconnect with their cursors; they have had what was seen.
                    timeline = Timeline::open(bounds, id, log.clone(), retained_of(&log), NOW);
                    seen = log.iter().map(|entry| entry.id).collect();
                }
            }
            if let Some(entry) = held_back { receive(&mut timeline, &entry, &log, &mut seen) }
        }
        catch_up(&mut timeline, &log, &mut seen);
        let all: Vec<u64> = log.iter().map(|entry| entry.id).collect();
        prop_assert_eq!(seen, all, "each once, in order");
        prop_assert_eq!(timeline.last(), log.last().unwrap().id);
        prop_assert_eq!(ids(timeline.retained(NOW)), ids(retained_of(&log).iter()));
        prop_assert!(timeline.recent.len() <= bounds.frames);
        prop_assert_eq!(timeline.recent_bytes, timeline.recent.iter().map(|entry| entry.frame.len()).sum::<usize>());
    }

    #[test]
    fn a_device_that_reads_in_any_steps_gets_the_same(
        kinds in proptest::collection::vec(0u8..3, 1..60), since in 0u64..70, read in proptest::collection::vec(1usize..9, 60)
    ) {
        let mut timeline = Timeline::new(BOUNDS, 0);
        for (step, kind) in kinds.iter().enumerate() {
            let id = step as u64 + 1;
            timeline.append(match kind {
                0 => broadcast(id, id - 1, NOW, 0),
                1 => broadcast(id, id - 1, NOW, LATER),
                _ => recall(id, id - 1, NOW, id / 2),
            }, NOW);
        }
        let (reader, _) = new_device(&timeline, since);
        let at_once = ids(timeline.after(reader, NOW));
        let mut in_steps = Vec::new();
        let mut at = reader;
        for count in read {
            // In one piece or not, it begins with the same.
            timeline.join_backlog(at, NOW);
            if let Some(run) = timeline.run(at, NOW) {
                let frames = timeline.after(at, NOW).take_while(|entry| entry.id <= at.login_head);
                prop_assert_eq!(&*run.span().bytes().unwrap(), frames.flat_map(|entry| entry.frame.iter().copied()).collect::<Vec<_>>());
            }
            let part = ids(timeline.after(at, NOW).take(count));
            at.cursor = part.last().copied().unwrap_or(at.cursor);
            in_steps.extend(part);
        }
        prop_assert!(at_once.windows(2).all(|pair| pair[0] < pair[1]));
        prop_assert_eq!(in_steps, at_once);
    }
}

#[test]
fn what_is_in_one_piece_is_what_is_retained_now() {
    let retained: Vec<_> = (1..=3).map(|id| broadcast(id, id - 1, NOW, LATER + id)).collect();
    let mut timeline = Timeline::open(BOUNDS, 3, retained.clone(), retained, NOW);
    let piece = |timeline: &mut Timeline| {
        let (reader, _) = new_device(timeline, 0);
        let is_kept = timeline.run(reader, NOW).is_some();
        timeline.join_backlog(reader, NOW);
        let run = timeline.run(reader, NOW).expect("put together");
        let frames: Vec<u8> = timeline.after(reader, NOW).flat_map(|entry| entry.frame.iter().copied()).collect();
        assert_eq!(&*run.span().bytes().unwrap(), frames);
        assert_eq!(timeline.admit(0, Platform::Web, NOW, 60_000).1, run.len());
        (is_kept, run.len())
    };
    // Nothing is put together for who has had it all, or comes back soon.
    for since in [3, 1] {
        let (reader, _) = new_device(&timeline, since);
        timeline.join_backlog(reader, NOW);
    }
    assert_eq!(piece(&mut timeline), (false, 3));
    assert_eq!(piece(&mut timeline), (true, 3));
    timeline.append(broadcast(4, 3, NOW, 0), NOW);
    assert_eq!(piece(&mut timeline), (true, 3), "one for online devices only changes nothing");
    timeline.append(broadcast(5, 4, NOW, LATER), NOW);
    assert_eq!(piece(&mut timeline), (false, 4));
    timeline.append(recall(6, 5, NOW, 2), NOW);
    assert_eq!(piece(&mut timeline), (false, 3));
    let _ = timeline.backfill(vec![], vec![broadcast(5, 4, NOW, LATER)], 6, true, NOW);
    assert_eq!(piece(&mut timeline), (false, 1));
    // One that resumes is given others in between.
    let (resuming, _) = new_device(&timeline, 1);
    assert!(resuming.resume_from < resuming.login_head && timeline.run(resuming, NOW).is_none());
}
