//! Calls of the server API, as a stranger or a careless client makes them (rows 33 and 36), and calls whose reply never comes
//! (row 37).

use sha1::{Digest, Sha1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use serde_json::{Value, json};

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::{Amqp, Api, request};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, unique, until};

const SEND: &str = "/nimserver/msg/broadcastMsg.action";
const FORM: &str = "application/x-www-form-urlencoded;charset=utf-8";

/// A call as bytes: nothing of it is made right by a client library.
#[derive(Debug, Clone)]
struct Call {
    method: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Call {
    /// One that is good in every respect.
    fn good(app: &App) -> Self {
        let (nonce, time) = (unique("nonce"), now_ms() / 1000);
        Self {
            method: "POST",
            path: SEND,
            headers: signature(app, &nonce, time).into_iter().chain([("Content-Type", FORM.to_owned())]).collect(),
            body: b"body=hello".to_vec(),
        }
    }

    fn signed_at(app: &App, seconds_off: i64) -> Self {
        let time = (now_ms() / 1000).saturating_add_signed(seconds_off);
        let mut call = Self::good(app);
        for (name, value) in signature(app, &unique("nonce"), time) {
            call = call.with(name, &value);
        }
        call
    }

    fn with(self, name: &'static str, value: &str) -> Self {
        self.without(name).and(name, value)
    }

    fn and(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(header, _)| *header != name);
        self
    }

    fn twice(self, name: &'static str) -> Self {
        let value = self.headers.iter().find(|(header, _)| *header == name).unwrap().1.clone();
        self.and(name, &value)
    }

    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    fn by(mut self, method: &'static str) -> Self {
        self.method = method;
        self
    }

    fn at(mut self, path: &'static str) -> Self {
        self.path = path;
        self
    }

    /// The HTTP status and the answer's JSON, null if it is none.
    async fn make(&self, process: &Process) -> (u16, Value) {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", self.method, self.path);
        head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        self.headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head.push_str("\r\n");
        let talk = async {
            let stream = TcpStream::connect(("127.0.0.1", process.public_port())).await.unwrap();
            let (mut from, mut to) = stream.into_split();
            let body = self.body.clone();
            // Beside the reading: who is refused early is still sending.
            let sending = tokio::spawn(async move {
                let _ = to.write_all(head.as_bytes()).await;
                let _ = to.write_all(&body).await;
                to
            });
            let mut answer = Vec::new();
            let _ = from.read_to_end(&mut answer).await;
            sending.abort();
            String::from_utf8(answer).unwrap()
        };
        let answer = timeout(SOON, talk).await.unwrap_or_else(|_| panic!("no answer to {} {}", self.method, self.path));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

fn signature(app: &App, nonce: &str, time: u64) -> [(&'static str, String); 4] {
    let digest = Sha1::digest(format!("{}{nonce}{time}", app.secret));
    let checksum = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    [("AppKey", app.key.clone()), ("Nonce", nonce.to_owned()), ("CurTime", time.to_string()), ("CheckSum", checksum)]
}

/// The queue of requests is there, and nobody takes anything from it: what gets through is counted.
async fn queue_without_a_worker(stack: &Stack) -> Amqp {
    stack.worker().await.drain(SOON).await;
    stack.amqp().await
}

/// Row 36: whatever is wrong with a call, the documented code says so and nothing is enqueued.
#[tokio::test]
async fn what_is_wrong_with_a_call_is_said_and_nothing_is_enqueued() {
    let (app, off) = (App::new(), App::off());
    let stack = Stack::new(&[app.clone(), off.clone()]);
    let amqp = queue_without_a_worker(&stack).await;
    let api = stack.role("api").with("api.reply_timeout_ms", "500").start().await;
    let good = || Call::good(&app);

    // Takes the nonce, but not to the queue: a replay is refused whatever the first call came to.
    let overheard = good().body("bodies=misspelt");
    assert_eq!(overheard.make(&api).await.1["code"], 414);

    let wrong = "0".repeat(40);
    let mut capitals = good();
    capitals.headers.iter_mut().filter(|(name, _)| *name == "CheckSum").for_each(|(_, sum)| *sum = sum.to_uppercase());
    let nobody = App::new();
    let mut bad = vec![
        ("a wrong checksum", good().with("CheckSum", &wrong), 414, "CheckSum"),
        ("a checksum in capitals", capitals, 414, "CheckSum"),
        ("no checksum", good().with("CheckSum", ""), 414, "CheckSum"),
        ("an unknown app", Call::good(&nobody), 414, "AppKey"),
        ("an hour old", Call::signed_at(&app, -3600), 414, "CurTime"),
        ("an hour ahead", Call::signed_at(&app, 3600), 414, "CurTime"),
        ("a time that is none", good().with("CurTime", "soon"), 414, "CurTime"),
        ("a replay", overheard.clone().body("body=replayed"), 414, "used before"),
        ("an empty nonce", good().with("Nonce", ""), 414, "Nonce"),
        ("a nonce of 129", good().with("Nonce", &"n".repeat(129)), 414, "Nonce"),
        ("no body parameter", good().body("isOffline=true"), 414, "body"),
        ("an empty body parameter", good().body("body="), 414, "body"),
        ("nothing at all", good().body(""), 414, "body"),
        ("body twice", good().body("body=a&body=b"), 414, "twice"),
        ("body twice, once in disguise", good().body("body=a&%62ody=b"), 414, "twice"),
        ("an unknown parameter", good().body("body=a&isoffline=true"), 414, "parameters"),
        ("a ttl in words", good().body("body=a&ttl=long"), 414, "ttl"),
        ("4097 characters", good().body(format!("body={}", "x".repeat(4097))), 414, "4096"),
        ("1 MiB", good().body(format!("body={}", "x".repeat(1 << 20))), 414, "bytes"),
        ("16 MiB", good().body(format!("body={}", "x".repeat(16 << 20))), 414, "bytes"),
        ("deep nesting", good().body(format!("body=a&targetOs={}", "[".repeat(60_000))), 414, "targetOs"),
        ("not UTF-8, escaped", good().body("body=%ff%fe"), 414, "UTF-8"),
        ("not UTF-8, raw", good().body(b"body=\xff\xfe".to_vec()), 414, "UTF-8"),
        ("JSON", good().with("Content-Type", "application/json").body(r#"{"body":"a"}"#), 414, "Content-Type"),
        ("another charset", good().with("Content-Type", &FORM.replace("utf-8", "gbk")), 414, "Content-Type"),
        ("no content type", good().without("Content-Type"), 414, "Content-Type"),
        ("GET", good().by("GET"), 414, "POST"),
        ("PUT", good().by("PUT"), 414, "POST"),
        ("another call", good().at("/nimserver/msg/sendMsg.action"), 404, "no such call"),
        ("an app that may not", Call::good(&off), 403, "not activated"),
    ];
    for header in ["AppKey", "Nonce", "CurTime", "CheckSum"] {
        bad.push((header, good().without(header), 414, header));
        bad.push((header, good().twice(header), 414, header));
    }
    for (name, call, code, said) in &bad {
        let (status, answer) = call.make(&api).await;
        assert_eq!((status, &answer["code"]), (200, &json!(code)), "{name}: {answer}");
        assert!(answer["desc"].as_str().is_some_and(|desc| desc.contains(said)), "{name}: {answer}");
    }
    // What is no HTTP that this server reads has no code of the API, but it has an end.
    let (status, _) = good().and("X-Huge", &"x".repeat(1 << 20)).make(&api).await;
    assert_eq!(status, 431, "huge headers");
    let many = (0..1000).fold(good(), |call, _| call.and("X-Many", "1"));
    assert_eq!(many.make(&api).await.0, 431, "a thousand headers");
    assert_eq!(amqp.ready("broadcast.requests").await, 0, "nothing was enqueued");

    // The check itself: a good call is enqueued, and answered that its end is not known, since nobody decides it.
    let taken = json!({ "requestId": unique("taken"), "appKey": app.key, "body": "taken" });
    let form = format!("body=taken&requestId={}", taken["requestId"].as_str().unwrap());
    let (status, answer) = good().body(form).make(&api).await;
    assert_eq!((status, &answer["code"]), (200, &json!(500)), "{answer}");
    assert_eq!(amqp.ready("broadcast.requests").await, 1);
    let replayed = overheard.body("body=replayed").make(&api).await.1;
    assert_eq!(replayed["code"], 414, "{replayed}");
    assert!(!api.output().contains("panicked"), "{}", api.output());
    // Nor had anything else an effect: of all of them, that one is decided, stored and charged.
    app.journal.sending(taken);
    let _worker = stack.worker().await;
    amqp.accepted(&request(&app, "the last")).await;
    let checker = after_row(&stack).await;
    assert_eq!(checker.accepted(), 2);
}

/// Row 33, over HTTP: 64 bodies of 16 MiB at once do not become 1 GiB in memory, and the next call is handled.
#[tokio::test]
async fn huge_bodies_are_refused_without_being_held() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, api) = tokio::join!(stack.worker(), stack.api());
    Api::new(&api.api_url(), &app).broadcast("before", false).await;
    let (before_kib, _) = api.memory_kib();
    let huge = Call::good(&app).body(format!("body={}", "x".repeat(16 << 20)));
    let calls = (0..8).map(async |_| {
        for _ in 0..8 {
            let (status, answer) = huge.clone().with("Nonce", &unique("nonce")).make(&api).await;
            assert_eq!((status, &answer["code"]), (200, &json!(414)), "{answer}");
        }
    });
    futures_util::future::join_all(calls).await;
    let (_, most_kib) = api.memory_kib();
    let grown_kib = most_kib.saturating_sub(before_kib);
    println!("64 bodies of 16 MiB, 8 at once: {before_kib} KiB before, {grown_kib} KiB more at the most");
    assert!(grown_kib < 64 * 1024, "{grown_kib} KiB more than before");
    Api::new(&api.api_url(), &app).broadcast("after", false).await;
    after_row(&stack).await;
}

async fn ask(api: &Process, app: &App, request: &Value) -> Value {
    let text = |name: &str| request[name].as_str().unwrap();
    let form = [("body", text("body")), ("requestId", text("requestId"))];
    Api::new(&api.api_url(), app).call("msg/broadcastMsg.action", &form).await
}

fn a_request(body: &str) -> Value {
    json!({ "requestId": unique("call"), "body": body })
}

fn assert_unknown(answer: &Value, request: &Value) {
    assert_eq!(answer["code"], 500, "{answer}");
    assert_eq!(answer["requestId"], request["requestId"], "{answer}");
    let desc = answer["desc"].as_str().unwrap();
    assert!(desc.starts_with("unknown") && desc.ends_with("ask again with the same requestId"), "{desc}");
}

/// Row 37: nobody decides; the caller is told just that, and asking again gets the one verdict.
#[tokio::test]
async fn without_a_worker_the_outcome_is_unknown_and_asking_again_gets_it() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let _amqp = queue_without_a_worker(&stack).await;
    let api = async { stack.role("api").with("api.reply_timeout_ms", "1000").start().await };
    let (mut api, node) = tokio::join!(api, stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let request = a_request("asked three times");
    for _ in 0..3 {
        assert_unknown(&ask(&api, &app, &request).await, &request);
    }
    api.drain(SOON).await;
    let (worker, api) = tokio::join!(stack.worker(), stack.api());
    let mut checker = Checker::default();
    for _ in 0..2 {
        checker.all_accepted(std::slice::from_ref(&request), &[ask(&api, &app, &request).await]);
    }
    let end = a_request("end");
    checker.all_accepted(std::slice::from_ref(&end), &[ask(&api, &app, &end).await]);
    device.collect(2, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(worker.metric("broadcastd_accepted_total").await, 2.0);
    assert_eq!(worker.metric("broadcastd_repeated_total").await, 4.0);
    after_row(&stack).await;
}

/// Row 37: accepted, and the worker is killed before it says so.
#[tokio::test]
async fn a_worker_killed_before_its_reply_leaves_the_outcome_unknown_and_the_next_one_knows_it() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let worker = async { stack.role("worker").failpoints("worker::before-reply=return(kill)").start().await };
    let api = async { stack.role("api").with("api.reply_timeout_ms", "2000").start().await };
    let (mut worker, node, api) = tokio::join!(worker, stack.node(), api);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let request = a_request("accepted, untold");
    assert_unknown(&ask(&api, &app, &request).await, &request);
    assert_eq!(worker.wait_killed().await.code(), None, "killed by a signal");
    // It is out already: unknown is not "failed".
    device.collect(1, SOON).await;
    worker.without_failpoints();
    worker.restart().await;
    let mut checker = Checker::default();
    let end = a_request("end");
    for request in [&request, &request, &end] {
        checker.all_accepted(std::slice::from_ref(request), &[ask(&api, &app, request).await]);
    }
    device.collect(2, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(worker.metric("broadcastd_accepted_total").await, 1.0, "only the last one is new");
    after_row(&stack).await;
}

/// Row 37: the API itself is killed, or stands still past its own deadline, with the request in the queue.
#[tokio::test]
async fn an_api_killed_or_stopped_after_enqueuing_is_asked_again() {
    for action in ["kill", "stop"] {
        let app = App::new();
        let stack = Stack::new(std::slice::from_ref(&app));
        let failpoints = format!("api::after-enqueue=1*return({action})");
        let api = stack.role("api").with("api.reply_timeout_ms", "1000").failpoints(&failpoints);
        let (worker, node, mut api) = tokio::join!(stack.worker(), stack.node(), async { api.start().await });
        let mut device = Device::online(&app, "web", &node.device_url()).await;
        let request = a_request("enqueued");
        let form = [("body", "enqueued"), ("requestId", request["requestId"].as_str().unwrap())];
        let sender = Api::new(&api.api_url(), &app);
        let call = sender.try_call("msg/broadcastMsg.action", &form);
        let fault = async {
            if action == "kill" {
                api.wait_killed().await;
                return;
            }
            api.wait_stopped().await;
            until("decided", SOON, async || match worker.metric("broadcastd_accepted_total").await {
                1.0 => Ok(()),
                accepted => Err(accepted),
            })
            .await;
            api.resume();
        };
        let (answer, ()) = tokio::join!(call, fault);
        match answer {
            Err(_) => assert_eq!(action, "kill"),
            Ok((status, answer)) if answer["code"] != 200 => {
                assert_eq!(status, 200);
                assert_unknown(&answer, &request);
            }
            Ok(_) => assert_eq!(action, "stop", "the reply was there when it went on"),
        }
        if action == "kill" {
            api.without_failpoints();
            api.restart().await;
        }
        let mut checker = Checker::default();
        let end = a_request("end");
        for request in [&request, &request, &end] {
            checker.all_accepted(std::slice::from_ref(request), &[ask(&api, &app, request).await]);
        }
        device.collect(2, SOON).await;
        checker.device(device.history(), Must::Everything, 0).unwrap();
        assert_eq!(worker.metric("broadcastd_accepted_total").await, 2.0);
        after_row(&stack).await;
    }
}
