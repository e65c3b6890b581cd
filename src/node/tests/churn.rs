//! Devices that come and go while broadcasts are being delivered.

use futures_util::future::join_all;

use super::super::testing::{Device, online, retained};
use super::start;

/// The contents, of those given, as numbers.
fn numbers(contents: &[String]) -> Vec<u64> {
    contents.iter().map(|content| content.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_stay_get_each_once_in_order() {
    const BROADCASTS: u64 = 60;
    let node = start(|_| {});
    let stay = join_all((0..20).map(|_| Device::online(node.port, "web", 0))).await;
    let stay: Vec<_> = stay
        .into_iter()
        .map(|(mut device, _)| {
            tokio::spawn(async move { numbers(&device.contents(usize::try_from(BROADCASTS).unwrap()).await) })
        })
        .collect();
    let mut go = Vec::new();
    for number in 0..BROADCASTS {
        let body: &'static str = Box::leak(number.to_string().into_boxed_str());
        node.ledger.say("demo", online(body));
        go.push(Device::online(node.port, "ios", 0).await.0);
        if number % 3 == 2 {
            // Some leave from the middle of the list, in the midst of a sweep.
            go.drain(..2);
        }
    }
    for device in stay {
        assert_eq!(device.await.unwrap(), (0..BROADCASTS).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_keeps_reconnecting_misses_nothing_and_gets_nothing_twice() {
    const BROADCASTS: usize = 90;
    let node = start(|_| {});
    let ledger = node.ledger.clone();
    let port = node.port;
    let reader = tokio::spawn(async move {
        let (mut cursor, mut seen) = (0, Vec::new());
        while seen.len() < BROADCASTS {
            let (mut device, welcome) = Device::online(port, "web", cursor).await;
            if welcome["pending"] == 0 {
                cursor = welcome["head"].as_u64().unwrap().max(cursor);
            }
            for _ in 0..7.min(BROADCASTS - seen.len()) {
                let told = device.next().await;
                cursor = told["id"].as_u64().unwrap();
                seen.push(told["content"].as_str().unwrap().to_owned());
            }
        }
        seen
    });
    for number in 0..BROADCASTS {
        let body: &'static str = Box::leak(number.to_string().into_boxed_str());
        ledger.say("demo", if number < 10 || number % 2 == 0 { retained(body) } else { online(body) });
        tokio::task::yield_now().await;
        if number == 10 {
            // From here on the device has a cursor, or gets the retained ones at its first login.
            while node.metrics.logins.get() == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
    assert_eq!(numbers(&reader.await.unwrap()), (0..BROADCASTS as u64).collect::<Vec<_>>());
}
