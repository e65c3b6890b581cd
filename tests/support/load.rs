//! Requests in numbers: all at once, or a steady stream.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::broadcastd::App;
use super::sender::{Amqp, request, retained};

/// The request of this number; every third is retained.
pub fn numbered(app: &App, number: usize) -> Value {
    let body = format!("number {number}");
    if number.is_multiple_of(3) { retained(app, &body) } else { request(app, &body) }
}

/// The requests of these numbers.
pub fn all_numbered(app: &App, numbers: Range<usize>) -> Vec<Value> {
    numbers.map(|number| numbered(app, number)).collect()
}

/// Sends requests all at once, and waits until the broker has them; their correlation ids.
pub async fn ask_all(amqp: &Amqp, requests: &[Value]) -> Vec<String> {
    let payloads: Vec<String> = requests.iter().map(Value::to_string).collect();
    join_all(payloads.iter().map(|payload| amqp.ask(payload.as_bytes()))).await
}

/// The verdicts of what was asked, in order.
pub async fn replies(amqp: &Amqp, asked: &[String]) -> Vec<Value> {
    join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await
}

/// A backend that goes on sending, whatever happens behind the broker.
#[derive(Debug)]
pub struct Load {
    stop: oneshot::Sender<()>,
    task: JoinHandle<(Vec<Value>, Vec<String>)>,
}

impl Load {
    /// Sends requests numbered from 0, one every `pace`, to the broker.
    pub fn start(amqp: Arc<Amqp>, app: &App, pace: Duration) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let app = app.clone();
        let task = tokio::spawn(async move {
            let (mut requests, mut asked) = (Vec::new(), Vec::new());
            let mut pace = tokio::time::interval(pace);
            while stopped.try_recv().is_err() {
                pace.tick().await;
                let request = numbered(&app, requests.len());
                asked.push(amqp.ask(request.to_string().as_bytes()).await);
                requests.push(request);
            }
            (requests, asked)
        });
        Self { stop, task }
    }

    /// Ends it; the requests that the broker took, and their correlation ids.
    pub async fn stop(self) -> (Vec<Value>, Vec<String>) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap()
    }
}
