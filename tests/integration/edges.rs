//! What must stay small however much there is, and end however others behave: a page of a long history, a long backfill, a process
//! whose admin port is held on to, an id that is hardly remembered.

use std::time::{Duration, Instant};

use broadcastd::broadcast::app::AppKey;
use broadcastd::ledger::redis::{Mode, RedisLedger, RedisSettings};
use broadcastd::ledger::{Kind, Ledger, LedgerSettings, NodeName};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::broadcastd::App;
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::proxy::{Proxy, Weather};
use crate::support::redis::Redis;
use crate::support::sender::request;
use crate::support::stack::Stack;
use crate::support::{SOON, unique};

/// Fills a log with ids 1 to `count`, of about `bytes` each; every `online`th is for online devices only, the others are retained.
/// 1 and 2 are retained still, and 2 is not in the log any more.
const FILL: &str = "
    local body = string.rep('x', ARGV[2])
    for id = 1, tonumber(ARGV[1]) do
      local expires = id % tonumber(ARGV[3]) == 0 and 0 or 9000000000000
      local envelope = '{\"v\":1,\"id\":' .. id .. ',\"prev\":' .. (id - 1) .. ',\"time\":1,\"expires\":'
        .. string.format('%.0f', expires) .. ',\"requestId\":\"r\",\"body\":\"' .. body .. '\"}'
      if id ~= 2 then redis.call('XADD', KEYS[1], id .. '-0', 'e', envelope) end
      if id <= 2 then redis.call('ZADD', KEYS[2], id, envelope) end
    end
    redis.call('SET', KEYS[3], ARGV[1] .. ' - - 0')
    return 'OK'";

/// A ledger on a server of this test, whose log is full.
async fn filled(redis: &Redis, url: String, timeout_ms: u64, fill: [u64; 3]) -> (RedisLedger, AppKey) {
    let settings = RedisSettings {
        url: url.into(),
        url_file: String::new(),
        mode: Mode::Single,
        sentinel_service: String::new(),
        sentinel_username: String::new(),
        sentinel_password: String::new().into(),
        sentinel_password_file: String::new(),
        key_prefix: Redis::prefix(),
        ca_file: String::new(),
        client_certificate_file: String::new(),
        client_key_file: String::new(),
        connect_timeout_ms: 5000,
        response_timeout_ms: timeout_ms,
        test_clock_key: None,
    };
    let app = AppKey::parse(&unique("long")).unwrap();
    let [log, retained, meta] =
        ["log", "retained", "meta"].map(|name| format!("{}{{{}}}:{name}", settings.key_prefix, app.as_str()));
    let fill = fill.map(|number| number.to_string());
    assert_eq!(redis.command(&["EVAL", FILL, "3", &log, &retained, &meta, &fill[0], &fill[1], &fill[2]]), "OK");
    let ledger = RedisLedger::start(settings, LedgerSettings { log_length: 10_000, log_hours: 1 });
    tokio::time::timeout(SOON, ledger.health().wait_for(Result::is_ok)).await.expect("connected").unwrap();
    (ledger, app)
}

/// What Redis has sent so far, in bytes.
fn sent(redis: &Redis) -> u64 {
    let stats = redis.command(&["INFO", "stats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:"));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_page_of_a_long_history_costs_a_page() {
    const COUNT: u64 = 3000;
    let redis = Redis::dedicated(&[]);
    let (ledger, app) = filled(&redis, redis.url(), 30_000, [COUNT, 4000, 500]).await;
    // Beside the pages: what the connection is asked every second.
    for (kind, before, limit, expected, most) in [
        (Kind::All, 0, 10, (COUNT - 9..=COUNT).rev().collect::<Vec<u64>>(), 300_000),
        (Kind::All, 1001, 100, (901..=1000).rev().collect(), 1_000_000),
        // Three portions, and the retained one that is not in the log in its place.
        (Kind::All, 405, 1000, (1..405).rev().collect(), 3_000_000),
        // Whatever is looked at on the way to them stays where it is.
        (Kind::OnlineOnly, 0, 100, (1..=6).rev().map(|number| number * 500).collect(), 300_000),
        (Kind::Retained, 0, 100, vec![2, 1], 300_000),
        (Kind::All, 1, 10, vec![], 300_000),
    ] {
        let at_first = sent(&redis);
        let page = ledger.list(&app, before, limit, kind).await.unwrap();
        let cost = sent(&redis) - at_first;
        let ids: Vec<u64> = page.iter().map(|envelope| envelope.id).collect();
        assert_eq!(ids, expected, "{kind:?} below {before}");
        assert!(cost < most, "{cost} bytes for {} of {kind:?} below {before}", ids.len());
    }
    // What is deleted is on no page, whichever portion it was in.
    for id in [2, 300, 404] {
        ledger.recall(&app, id).await.unwrap().expect("it was there");
        assert!(ledger.find(&app, id).await.unwrap().is_none());
    }
    let page = ledger.list(&app, 405, 1000, Kind::All).await.unwrap();
    let ids: Vec<u64> = page.iter().map(|envelope| envelope.id).collect();
    assert_eq!(ids, (1..405).rev().filter(|id| ![2, 300, 404].contains(id)).collect::<Vec<u64>>());
}

/// 6 MB over a line of 3 MB a second, with an answer in half a second or none.
#[tokio::test]
async fn a_long_backfill_over_a_slow_line_comes_to_its_end() {
    const COUNT: u64 = 6000;
    let redis = Redis::dedicated(&[]);
    let proxy = Proxy::to(redis.port()).await;
    let url = proxy.instead_of(&redis.url(), redis.port());
    let (ledger, app) = filled(&redis, url, 1000, [COUNT, 900, 7]).await;
    proxy.weather(Weather::Delay(Duration::from_millis(4)));
    let node = NodeName(unique("node").into());
    let snapshot = ledger.join(&app, &node, SOON, 3).await.unwrap();
    let ids: Vec<u64> = snapshot.log.iter().map(|stored| stored.envelope.id).collect();
    assert!(ids.iter().copied().eq(4..=COUNT), "{} of them, up to {:?}", ids.len(), ids.last());
    assert_eq!((snapshot.head, snapshot.retained.len(), snapshot.logged), (COUNT, 2, Some(COUNT - 1)));
    // The lease was taken with the end of it.
    let lease = redis.command(&["--scan", "--pattern", "*:nodes"]);
    assert!(lease.contains(app.as_str()), "{lease}");
}

/// A second is over before the next worker looks at it.
#[tokio::test]
async fn an_id_that_is_to_be_remembered_for_a_second_outlives_an_outage() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let victim = stack.role("worker").failpoints("ledger::before-answer=1*off->1*return(stop)");
    let (mut victim, node) = tokio::join!(victim.start(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    // By now Redis knows the script: the one that follows is carried out before the worker stands still.
    amqp.accepted(&request(&app, "before")).await;
    let mut short = request(&app, "once");
    short["dedupeSeconds"] = 1.into();
    let asked = amqp.ask(short.to_string().as_bytes()).await;
    victim.wait_stopped().await;
    let key = format!("{}{{{}}}:request:{}", stack.prefix, app.key, short["requestId"].as_str().unwrap());
    let left: i64 = Redis::shared().command(&["PTTL", &key]).parse().unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    victim.kill();
    let worker = stack.worker().await;
    let reply = amqp.reply(&asked).await;
    let mut checker = Checker::default();
    checker.verdict(&short, &reply).unwrap();
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "once", "end"]);
    checker.device(&device.history()[1..2], Must::Everything, 0).unwrap();
    assert_eq!(worker.metric("broadcastd_repeated_total").await, 1.0);
    assert!(left > 290_000, "{left} ms");
}

#[tokio::test]
async fn who_stalls_on_the_admin_port_does_not_keep_a_drained_process_alive() {
    let app = App::new();
    let mut worker = Stack::new(std::slice::from_ref(&app)).worker().await;
    let connected = Instant::now();
    let mut stalled = TcpStream::connect(worker.admin_address()).await.unwrap();
    stalled.write_all(b"GET /metrics HT").await.unwrap();
    // It came after that one, and was served.
    worker.metrics().await;
    let status = worker.drain(SOON).await;
    assert!(status.success(), "{status}: {}", worker.output());
    // Otherwise not before the time for a request's head is over, 5 s; and longer with one who asks and never reads.
    assert!(connected.elapsed() < Duration::from_millis(4500), "{:?}", connected.elapsed());
}
