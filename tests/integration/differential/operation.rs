//! What is tried: operations, and how they are generated.

use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::MAX_DEDUPE_MS;
use broadcastd::ledger::Kind;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
pub enum Operation {
    Accept(Vec<Sending>),
    /// So many retained ones at once, each under an id of its own.
    Burst(usize, u64),
    Recall(usize, Pick),
    Find(usize, Pick),
    List(usize, Pick, usize, Kind),
    Join(usize, usize, u64, Pick),
    Renew(Vec<usize>, usize, u64),
    Leave(usize, usize),
    Subscribe(usize),
    Unsubscribe(usize),
    /// Head, retained, recalled; and whether the first of the retained is among the recalled.
    Restore(usize, Pick, Vec<Lost>, Vec<Pick>, bool),
    Clock(i64),
    /// To the moment when the app's nth last envelope expires, or a millisecond beside it; and a look for it.
    Expiry(usize, usize, i64),
    Generation(usize),
}

#[derive(Debug, Clone)]
pub struct Sending {
    pub app: usize,
    pub request_id: usize,
    pub body: usize,
    pub ttl_ms: Option<u64>,
    pub dedupe_ms: u64,
    pub limits: Limits,
}

/// An id: none, the nth last that was given away for the app (or one beside it), or one from this long ago.
#[derive(Debug, Clone)]
pub enum Pick {
    None,
    Known(usize, i64),
    Ago(u64),
}

/// A broadcast that a node writes back: one that it was given, or one that nobody else knows.
#[derive(Debug, Clone)]
pub enum Lost {
    Known(usize),
    Made(u64, u64),
}

pub const APPS: [&str; 3] = ["a", "b.c", "D_1"];
pub const NODES: [&str; 3] = ["node-0", "node-1", "node-2"];
const HALF_SECOND: u64 = 500;
const DAY_MS: u64 = 86_400_000;

pub fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let (app, node) = (0..APPS.len(), 0..NODES.len());
    let kind = select(vec![Kind::All, Kind::Retained, Kind::OnlineOnly]);
    let limit = prop_oneof![0usize..5, Just(100), Just(1000)];
    let lost = prop_oneof![
        3 => proptest::collection::vec(lost(), 0..5),
        1 => proptest::collection::vec(lost(), 90..130),
    ];
    prop_oneof![
        30 => proptest::collection::vec(sending(), 1..4).prop_map(O::Accept),
        4 => (40usize..110, time()).prop_map(|(count, ttl)| O::Burst(count, ttl)),
        6 => (app.clone(), pick()).prop_map(|(app, id)| O::Recall(app, id)),
        6 => (app.clone(), pick()).prop_map(|(app, id)| O::Find(app, id)),
        8 => (app.clone(), pick(), limit, kind).prop_map(|(app, id, limit, kind)| O::List(app, id, limit, kind)),
        8 => (app.clone(), node.clone(), time(), pick()).prop_map(|(app, node, lease, id)| O::Join(app, node, lease, id)),
        4 => (proptest::collection::vec(app.clone(), 0..4), node.clone(), time())
            .prop_map(|(apps, node, lease)| O::Renew(apps, node, lease)),
        2 => (app.clone(), node).prop_map(|(app, node)| O::Leave(app, node)),
        3 => app.clone().prop_map(O::Subscribe),
        1 => app.clone().prop_map(O::Unsubscribe),
        4 => (app, pick(), lost, proptest::collection::vec(pick(), 0..3), any::<bool>())
            .prop_map(|(app, head, lost, recalled, first)| O::Restore(app, head, lost, recalled, first)),
        9 => (0..APPS.len(), 0usize..12, select(vec![0, 0, 0, 0, -1, 1]))
            .prop_map(|(app, nth, beside_ms)| O::Expiry(app, nth, beside_ms)),
        16 => step().prop_map(O::Clock),
        2 => (0usize..4).prop_map(O::Generation),
    ]
}

fn sending() -> impl Strategy<Value = Sending> {
    let limits = select(vec![(3, 5), (3, 1000), (10, 12), (u32::MAX, u32::MAX)])
        .prop_map(|(per_minute, per_day)| Limits { per_minute, per_day });
    let dedupe_ms = prop_oneof![Just(MAX_DEDUPE_MS), time()];
    (0..APPS.len(), 0usize..12, 0usize..8, proptest::option::of(time()), dedupe_ms, limits).prop_map(
        |(app, request_id, body, ttl_ms, dedupe_ms, limits)| {
            // One content in four is another, so that both repetitions and conflicts come up.
            Sending {
                app,
                request_id,
                body: body / 6,
                ttl_ms: ttl_ms.filter(|_| request_id % 3 != 0),
                dedupe_ms,
                limits,
            }
        },
    )
}

/// A validity in ms: few different ones, so that a request comes again unchanged.
fn time() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => select(vec![2 * HALF_SECOND, 4 * HALF_SECOND, 60 * HALF_SECOND]),
        3 => select(vec![3_600_000, DAY_MS, 30 * DAY_MS]),
    ]
}

/// A step of the clock, in µs.
fn step() -> impl Strategy<Value = i64> {
    let half = HALF_SECOND as i64 * 1000;
    prop_oneof![
        8 => (1i64..8).prop_map(move |steps| steps * half),
        3 => (1i64..200).prop_map(move |steps| steps * half),
        2 => 1i64..2_000_000,
        2 => (1i64..50).prop_map(|hours| hours * 3_600_000_000),
        1 => (1i64..9).prop_map(|days| days * 86_400_000_000),
        2 => (1i64..4).prop_map(move |steps| -steps * half),
        1 => -300_000i64..0,
    ]
}

fn pick() -> impl Strategy<Value = Pick> {
    prop_oneof![
        2 => Just(Pick::None),
        8 => (0usize..12, prop_oneof![6 => Just(0i64), 1 => -1i64..2]).prop_map(|(nth, beside)| Pick::Known(nth, beside)),
        1 => (0u64..200).prop_map(|steps| Pick::Ago(steps * HALF_SECOND * 1000)),
    ]
}

fn lost() -> impl Strategy<Value = Lost> {
    prop_oneof![
        (0usize..120).prop_map(Lost::Known),
        (0u64..200_000_000, time()).prop_map(|(ago_us, ttl_ms)| Lost::Made(ago_us, ttl_ms)),
    ]
}
