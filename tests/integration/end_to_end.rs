//! One request in, every device of the app has it: all roles as processes of their own, on RabbitMQ and Redis.

use crate::support::SOON;
use crate::support::broadcastd::App;
use crate::support::device::Device;
use crate::support::sender::{Api, request};
use crate::support::stack::Stack;
use crate::support::until;

#[tokio::test]
async fn one_call_reaches_devices_on_every_node_and_a_delete_takes_it_back() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (api, _worker, _other_worker, node, other_node) =
        tokio::join!(stack.api(), stack.worker(), stack.worker(), stack.node(), stack.node());
    let sender = Api::new(&api.api_url(), &app);
    let mut phone = Device::online(&app, "ios", &node.device_url()).await;
    let mut browser = Device::online(&app, "web", &other_node.device_url()).await;

    let id = sender.broadcast("hello, everyone", true).await;
    for device in [&mut phone, &mut browser] {
        let arrival = device.expect_broadcast(SOON).await;
        assert_eq!((arrival.id, arrival.content.as_str()), (id, "hello, everyone"));
    }

    let id_text = id.to_string();
    let by_id = [("broadcastId", id_text.as_str())];
    let found = sender.call("history/queryBroadcastMsgById.action", &by_id).await;
    assert_eq!((&found["code"], &found["msg"]["body"]), (&200.into(), &"hello, everyone".into()), "{found}");
    let listing = [("broadcastId", "0"), ("limit", "10"), ("type", "1")];
    let listed = sender.call("history/queryBroadcastMsg.action", &listing).await;
    assert!(listed.to_string().contains("hello, everyone"), "{listed}");

    let deleted = sender.call("history/delBroadcastMsgById.action", &by_id).await;
    assert_eq!(deleted["code"], 200, "{deleted}");
    for device in [&mut phone, &mut browser] {
        assert_eq!(device.expect_recall(SOON).await, id);
    }
    let found = sender.call("history/queryBroadcastMsgById.action", &by_id).await;
    assert_eq!(found["code"], 404, "{found}");

    // Devices that come later, on either node: the first thing they get is what is sent after the delete.
    let mut late = Device::online(&app, "aos", &node.device_url()).await;
    let mut later = Device::online(&app, "mac", &other_node.device_url()).await;
    let next = sender.broadcast("next", false).await;
    for device in [&mut phone, &mut browser, &mut late, &mut later] {
        assert_eq!(device.expect_broadcast(SOON).await.id, next);
    }
}

#[tokio::test]
async fn one_request_id_leads_through_every_roles_log() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (api, worker, node) = tokio::join!(stack.api(), stack.worker(), stack.node());
    let mut device = Device::online(&app, "pc", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), &app);
    let form = [("body", "the-secret-body"), ("requestId", "trace-me-1")];
    let answer = sender.call("msg/broadcastMsg.action", &form).await;
    assert_eq!(answer["code"], 200, "{answer}");
    device.expect_broadcast(SOON).await;
    let id = answer["msg"]["broadcastId"].to_string();
    for role in [&api, &worker, &node] {
        until("a log line with the request id and the id", SOON, async || {
            let output = role.output();
            assert!(!output.contains("the-secret-body"), "a body was logged:\n{output}");
            let found = output.lines().any(|line| line.contains("trace-me-1") && line.contains(&id));
            if found { Ok(()) } else { Err(output) }
        })
        .await;
    }
}

#[tokio::test]
async fn figures_and_readiness_tell_what_happened() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "one")).await;
    amqp.accepted(&request(&app, "two")).await;
    device.collect(2, SOON).await;
    for (name, expected) in [
        ("broadcastd_consumed_total", 2.0),
        ("broadcastd_accepted_total", 2.0),
        ("broadcastd_nodes_targeted_total", 2.0),
        ("broadcastd_nodes_reached_total", 2.0),
    ] {
        until(name, SOON, async || match worker.metric(name).await {
            value if (value - expected).abs() < 0.1 => Ok(()),
            value => Err(value),
        })
        .await;
    }
    until("two deliveries", SOON, async || match node.metric("broadcastd_deliveries_total").await {
        2.0 => Ok(()),
        value => Err(value),
    })
    .await;
    assert!((node.metric("broadcastd_sessions").await - 1.0).abs() < 0.1);
    let (status, body) = worker.readiness().await.unwrap();
    assert_eq!(status, 200, "{body}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(
        body.to_string().contains("redis") || body.to_string().contains("ledger"),
        "one entry a dependency: {body}"
    );
}
