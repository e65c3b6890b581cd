use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::HeaderValue;

use super::super::testing::{Bench, START, settings, signed};
use super::*;

const SEND: &str = Call::Broadcast.path();

fn bench() -> Bench {
    Bench::new(settings())
}

#[tokio::test]
async fn the_documented_call_is_answered_as_documented() {
    let bench = bench();
    let answer = bench
        .call(
            SEND,
            &[
                ("body", "hello 世界 & + %"),
                ("from", "ops"),
                ("isOffline", "true"),
                ("ttl", "2"),
                ("targetOs", r#"["ios","web"]"#),
            ],
        )
        .await;
    assert_eq!(
        answer,
        json!({"code":200,"msg":{"broadcastId":START,"createTime":START/1000,"expireTime":START/1000+7_200_000,
            "isOffline":true,"from":"ops","body":"hello 世界 & + %","targetOs":["ios","web"]}})
    );
    let text = bench.metrics.text().unwrap();
    assert!(text.contains(r#"broadcastd_api_calls_total{call="broadcast",code="200"} 1"#), "{text}");
    assert!(text.contains("broadcastd_accepted_total 1"));
}

#[tokio::test]
async fn without_options_it_is_for_online_devices_of_every_platform() {
    let answer = bench().call(SEND, &[("body", "hi")]).await;
    assert_eq!(answer["msg"]["targetOs"], json!(["all"]));
    assert_eq!(answer["msg"]["isOffline"], false);
    assert_eq!(answer["msg"].get("expireTime"), None);
}

/// Every kind of bad parameters: 414, and nothing reaches the ledger.
#[tokio::test]
async fn bad_parameters_are_refused_and_nothing_is_submitted() {
    let bench = bench();
    let long = format!("body={}", "x".repeat(4097));
    let long_from = format!("body=hi&from={}", "x".repeat(33));
    for body in [
        "",
        "body=",
        "from=ops",
        "body=a&body=b",
        "body=%ff",
        "body=%e4%b8",
        "body=1%",
        long.as_str(),
        long_from.as_str(),
        "body=hi&isOffline=yes",
        "body=hi&ttl=0",
        "body=hi&ttl=-1",
        "body=hi&ttl=1.5",
        "body=hi&ttl=99999999999999999999",
        "body=hi&ttl=721",
        "body=hi&ttl=1&ttlSeconds=60",
        "body=hi&targetOs=ios",
        "body=hi&targetOs=[]",
        "body=hi&targetOs=[1]",
        "body=hi&targetOs=[\"symbian\"]",
        "body=hi&requestId=a b",
        "body=hi&dedupeSeconds=0",
        "body=hi&isofline=true",
    ] {
        let answer = bench.send(signed(SEND, "demo", body.to_owned())).await;
        assert_eq!(answer["code"], 414, "{}: {answer}", &body[..body.len().min(60)]);
        assert!(answer["desc"].as_str().is_some_and(|desc| desc.len() > 10));
    }
    let mut json_type = signed(SEND, "demo", r#"{"body":"hi"}"#);
    json_type.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    assert_eq!(bench.send(json_type).await["code"], 414);
    let mut no_type = signed(SEND, "demo", "body=hi");
    no_type.headers_mut().remove("content-type");
    assert_eq!(bench.send(no_type).await["code"], 414);
    assert_eq!(bench.send(signed(SEND, "demo", vec![b'x'; 1 << 20])).await["code"], 414);
    let endless = Body::from_stream(futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b'x'; 1 << 16])));
    assert_eq!(bench.send(signed(SEND, "demo", endless)).await["code"], 414);
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
    assert_eq!(bench.call(SEND, &[("body", "the next one is handled")]).await["code"], 200);
}

#[tokio::test]
async fn bad_signatures_are_refused_and_nothing_is_submitted() {
    let bench = bench();
    for name in ["AppKey", "Nonce", "CurTime", "CheckSum"] {
        let mut missing = signed(SEND, "demo", "body=hi");
        missing.headers_mut().remove(name);
        assert_eq!(bench.send(missing).await["code"], 414, "{name} missing");
        let mut repeated = signed(SEND, "demo", "body=hi");
        let value = repeated.headers()[name].clone();
        repeated.headers_mut().append(name, value);
        assert_eq!(bench.send(repeated).await["code"], 414, "{name} repeated");
        let mut foreign = signed(SEND, "demo", "body=hi");
        foreign.headers_mut().insert(name, HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(bench.send(foreign).await["code"], 414, "{name} not ASCII");
        let mut changed = signed(SEND, "demo", "body=hi");
        changed.headers_mut().insert(name, HeaderValue::from_static("1"));
        assert_eq!(bench.send(changed).await["code"], 414, "{name} changed");
    }
    let unknown = bench.send(signed(SEND, "nobody", "body=hi")).await;
    let mut wrong = signed(SEND, "demo", "body=hi");
    wrong.headers_mut().insert("CheckSum", HeaderValue::from_static("8a64b2957e84dff1ca4bf4e5d0ad24e5dac7ee2b"));
    assert_eq!(unknown, bench.send(wrong).await, "which keys exist is not told");
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_replayed_signature_is_refused_even_for_another_call() {
    let bench = bench();
    let first = signed(SEND, "demo", "body=hi");
    let mut replay = signed(Call::Query.path(), "demo", "");
    *replay.headers_mut() = first.headers().clone();
    assert_eq!(bench.send(first).await["code"], 200);
    assert_eq!(bench.send(replay).await["code"], 414);
}

#[tokio::test]
async fn while_replays_cannot_be_told_nobody_is_let_in() {
    let bench = bench();
    bench.ledger.forgetful.store(true, Ordering::SeqCst);
    assert_eq!(bench.send(signed(SEND, "demo", "body=hi")).await["code"], 503);
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
    // A wrong signature is still told so: it needs nobody's memory.
    let mut wrong = signed(SEND, "demo", "body=hi");
    wrong.headers_mut().insert("CheckSum", "0".parse().unwrap());
    assert_eq!(bench.send(wrong).await["code"], 414);
}

/// A disk that hangs, say: the call must not keep its connection for ever.
#[tokio::test(start_paused = true)]
async fn a_ledger_that_never_says_whether_it_is_a_replay_is_not_waited_for() {
    let bench = bench();
    let held = bench.ledger.uses.write().await;
    let patience = settings().reply_timeout() * 2;
    let answer = tokio::time::timeout(patience, bench.send(signed(SEND, "demo", "body=hi"))).await.expect("it waits");
    assert_eq!(answer["code"], 503, "{answer}");
    drop(held);
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
    assert_eq!(bench.call(SEND, &[("body", "hi")]).await["code"], 200);
}

#[tokio::test]
async fn an_app_with_broadcasts_off_is_refused_with_403() {
    let bench = bench();
    assert_eq!(bench.send(signed(SEND, "quiet", "body=hi")).await["code"], 403);
    assert_eq!(bench.send(signed(Call::Query.path(), "quiet", "")).await["code"], 403);
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_same_request_id_is_one_broadcast_and_another_content_is_refused() {
    let bench = bench();
    let first = bench.call(SEND, &[("body", "hi"), ("requestId", "r-1")]).await;
    let again = bench.call(SEND, &[("body", "hi"), ("requestId", "r-1")]).await;
    assert_eq!(first, again);
    assert_eq!(bench.call(SEND, &[("body", "other"), ("requestId", "r-1")]).await["code"], 414);
    assert!(bench.metrics.text().unwrap().contains("broadcastd_repeated_total 1"));
}

#[tokio::test]
async fn an_empty_request_id_is_none() {
    let bench = bench();
    let first = bench.call(SEND, &[("body", "hi"), ("requestId", "")]).await;
    let second = bench.call(SEND, &[("body", "hi"), ("requestId", "")]).await;
    assert_eq!((&first["code"], &second["code"]), (&json!(200), &json!(200)));
    assert_ne!(first["msg"]["broadcastId"], second["msg"]["broadcastId"]);
    let mut traced = signed(SEND, "demo", "body=hi&requestId=");
    traced.headers_mut().insert("RequestId", HeaderValue::from_static("trace-1"));
    bench.send(traced).await;
    assert!(bench.ledger.submissions.lock().unwrap()[2].request.id.starts_with("sdk:trace-1:"));
}

#[tokio::test]
async fn an_sdk_retry_is_one_broadcast_and_one_trace_id_may_send_several() {
    let bench = bench();
    let send = async |trace: &str, body: &str| {
        let mut request = signed(SEND, "demo", body.to_owned());
        request.headers_mut().insert("RequestId", HeaderValue::from_str(trace).unwrap());
        bench.send(request).await["msg"]["broadcastId"].as_u64().unwrap()
    };
    let first = send("trace-1", "body=hi").await;
    assert_eq!(send("trace-1", "body=hi").await, first, "a retry: new nonce, same trace id, same content");
    assert_ne!(send("trace-1", "body=other").await, first);
    assert_ne!(send("trace-2", "body=hi").await, first);
    let odd = "a trace id with spaces ".repeat(20);
    assert_eq!(send(&odd, "body=hi").await, send(&odd, "body=hi").await);
    let submissions = bench.ledger.submissions.lock().unwrap();
    assert!(submissions[0].request.id.starts_with("sdk:trace-1:"));
    assert!(submissions.iter().all(|submission| submission.request.dedupe_ms == SDK_DEDUPE_MS));
    assert!(submissions.iter().all(|submission| submission.request.id.len() <= MAX_REQUEST_ID));
}

#[tokio::test]
async fn over_the_limit_is_416_with_the_time_to_wait() {
    let bench = bench();
    for _ in 0..10 {
        assert_eq!(bench.call(SEND, &[("body", "hi")]).await["code"], 200);
    }
    let refused = bench.call(SEND, &[("body", "hi")]).await;
    assert_eq!((&refused["code"], &refused["retryAfter"]), (&json!(416), &json!(37)));
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_and_sends_once() {
    let bench = bench();
    bench.ledger.lose_answers.store(1, Ordering::SeqCst);
    assert_eq!(bench.call(SEND, &[("body", "hi")]).await["msg"]["broadcastId"], START);
    assert_eq!(bench.call(Call::Query.path(), &[]).await["msgs"].as_array().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_ledger_that_stays_away_is_an_honest_unknown_with_the_id_to_retry() {
    let bench = bench();
    bench.ledger.down.store(true, Ordering::SeqCst);
    let answer = bench.call(SEND, &[("body", "hi")]).await;
    assert_eq!(answer["code"], 500);
    assert!(answer["desc"].as_str().unwrap().starts_with("unknown: "));
    let id = answer["requestId"].as_str().unwrap().to_owned();
    assert_eq!(bench.call(Call::Query.path(), &[]).await["code"], 503);
    bench.ledger.down.store(false, Ordering::SeqCst);
    assert_eq!(bench.call(SEND, &[("body", "hi"), ("requestId", &id)]).await["code"], 200);
}

#[tokio::test]
async fn more_than_the_bound_under_way_is_503_at_once() {
    let bench = Bench::new(super::super::ApiSettings { max_in_flight: 0, ..settings() });
    let answer = bench.call(SEND, &[("body", "hi")]).await;
    assert_eq!((&answer["code"], answer.get("requestId")), (&json!(503), None));
    let answer = bench.call(SEND, &[("body", "hi"), ("requestId", "r-1")]).await;
    assert_eq!((&answer["code"], &answer["requestId"]), (&json!(503), &json!("r-1")));
    assert!(bench.ledger.submissions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn broadcasts_are_listed_found_and_deleted() {
    let bench = bench();
    for (body, offline) in [("one", "true"), ("two", "false"), ("three", "1")] {
        bench.call(SEND, &[("body", body), ("isOffline", offline)]).await;
    }
    let list = async |parameters: &[(&str, &str)]| -> Vec<u64> {
        let answer = bench.call(Call::Query.path(), parameters).await;
        assert_eq!(answer["code"], 200);
        answer["msgs"].as_array().unwrap().iter().map(|item| item["broadcastId"].as_u64().unwrap() - START).collect()
    };
    assert_eq!(list(&[]).await, [2, 1, 0]);
    assert_eq!(list(&[("broadcastId", "0"), ("limit", "2"), ("type", "1")]).await, [2, 1]);
    assert_eq!(list(&[("broadcastId", &(START + 1).to_string())]).await, [0]);
    assert_eq!(list(&[("type", "2")]).await, [2, 0]);
    assert_eq!(list(&[("type", "3")]).await, [1]);
    for bad in [("limit", "0"), ("limit", "101"), ("type", "4"), ("broadcastId", "-1"), ("broadcastId", "x")] {
        assert_eq!(bench.call(Call::Query.path(), &[bad]).await["code"], 414, "{bad:?}");
    }

    let id = (START + 1).to_string();
    let one = [("broadcastId", id.as_str())];
    let found = bench.call(Call::QueryById.path(), &one).await;
    assert_eq!(
        found,
        json!({"code":200,"msg":{"broadcastId":START+1,"createTime":START/1000,"isOffline":false,"body":"two","targetOs":["all"]}})
    );
    assert_eq!(bench.call(Call::Delete.path(), &one).await, json!({"code":200}));
    assert_eq!(bench.call(Call::Delete.path(), &one).await["code"], 404);
    assert_eq!(bench.call(Call::QueryById.path(), &one).await["code"], 404);
    assert_eq!(bench.call(Call::QueryById.path(), &[]).await["code"], 414);
}

/// The ledger may have deleted it before it went silent: not "nothing was sent".
#[tokio::test(start_paused = true)]
async fn a_deletion_without_an_answer_is_unknown() {
    let bench = bench();
    bench.call(SEND, &[("body", "hi")]).await;
    let id = START.to_string();
    let one = [("broadcastId", id.as_str())];
    bench.ledger.down.store(true, Ordering::SeqCst);
    assert_eq!(bench.call(Call::Delete.path(), &one).await["code"], 500);
    bench.ledger.down.store(false, Ordering::SeqCst);
    let held = bench.ledger.recalls.write().await;
    let answer = bench.call(Call::Delete.path(), &one).await;
    assert_eq!(answer["code"], 500);
    assert!(answer["desc"].as_str().unwrap().starts_with("unknown: "), "{answer}");
    drop(held);
    assert_eq!(bench.call(Call::Delete.path(), &one).await["code"], 200);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_hangs_up_does_not_stop_its_deletion() {
    let bench = bench();
    bench.call(SEND, &[("body", "hi")]).await;
    let id = START.to_string();
    let one = [("broadcastId", id.as_str())];
    let held = bench.ledger.recalls.write().await;
    let patience = std::time::Duration::from_millis(100);
    assert!(tokio::time::timeout(patience, bench.call(Call::Delete.path(), &one)).await.is_err(), "hung up");
    drop(held);
    // The task that was left runs when this one lets it.
    tokio::task::yield_now().await;
    assert_eq!(bench.call(Call::QueryById.path(), &one).await["code"], 404);
}

/// Over a real connection: one that is closed while its client still sends is reset, and the answer is lost.
#[tokio::test]
async fn a_body_that_is_far_too_large_is_told_so() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let server = tokio::spawn(super::super::serve::serve(listener, bench().router, shutdown.clone()));
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    let body = vec![b'x'; 16 << 20];
    let head =
        format!("POST {SEND} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(&body).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""code":414"#), "{answer}");
    shutdown.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn every_path_under_nimserver_answers_200_with_a_code() {
    let bench = bench();
    let get = |path: &str| HttpRequest::get(path).body(Body::empty()).unwrap();
    assert_eq!(bench.send(get(LIVENESS)).await, json!({"code":200}));
    assert_eq!(bench.send(get(SEND)).await["code"], 414);
    assert_eq!(bench.send(get("/nimserver/msg/sendMsg.action")).await["code"], 404);
    assert_eq!(bench.send(get("/nimserver/im/v2/broadcast_notification")).await["code"], 404);
    assert_eq!(bench.raw(get("/elsewhere")).await.status(), 404);
}
