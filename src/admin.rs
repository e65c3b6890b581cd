//! The admin listener: `/healthz`, `/readyz` and `/metrics`. Not for the public: it tells what the process depends on.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::metrics::Metrics;

/// A dependency's name and its state: ready, or why not, as a sentence without secrets or addresses.
pub type Dependency = (&'static str, watch::Receiver<Result<(), String>>);

struct Admin {
    dependencies: Vec<Dependency>,
    draining: watch::Receiver<bool>,
    metrics: Metrics,
}

/// The routes. `draining`: whether the process is on its way out, so that balancers stop sending it anything.
pub fn router(dependencies: Vec<Dependency>, draining: watch::Receiver<bool>, metrics: Metrics) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(text))
        .with_state(Arc::new(Admin { dependencies, draining, metrics }))
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    let draining = *admin.draining.borrow();
    let mut ready = !draining;
    let mut entries = Map::new();
    for (name, state) in admin.look() {
        ready &= state.is_ok();
        let entry = match state {
            Ok(()) => json!({ "ready": true }),
            Err(reason) => json!({ "ready": false, "reason": reason }),
        };
        entries.insert(name.to_owned(), entry);
    }
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "ready": ready, "draining": draining, "dependencies": Value::Object(entries) });
    (status, [(CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

async fn text(State(admin): State<Arc<Admin>>) -> Response {
    // Looked at here too: who only scrapes must not see an old value.
    admin.look();
    match admin.metrics.text() {
        Ok(text) => ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

impl Admin {
    fn look(&self) -> Vec<(&'static str, Result<(), String>)> {
        let states = self.dependencies.iter().map(|(name, state)| {
            // A part that ended without a word has dropped its sender; its last word no longer holds.
            let gone = state.has_changed().is_err();
            let state = if gone { Err("it has stopped".to_owned()) } else { state.borrow().clone() };
            self.metrics.ready.with_label_values(&[name]).set(i64::from(state.is_ok()));
            (*name, state)
        });
        states.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request;
    use tower_service::Service;

    async fn get_text(router: &Router, path: &str) -> (StatusCode, String) {
        let response = router.clone().call(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn it_is_ready_while_every_dependency_is_and_it_does_not_drain() {
        let (redis, redis_state) = watch::channel(Ok(()));
        let (amqp, amqp_state) = watch::channel(Ok(()));
        let (drain, draining) = watch::channel(false);
        let router = router(vec![("redis", redis_state), ("amqp", amqp_state)], draining, Metrics::new().unwrap());
        assert_eq!(get_text(&router, "/readyz").await.0, 200);

        redis.send(Err("no answer".to_owned())).unwrap();
        let (status, body) = get_text(&router, "/readyz").await;
        assert_eq!(status, 503);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            body,
            json!({"ready":false,"draining":false,"dependencies":
                {"redis":{"ready":false,"reason":"no answer"},"amqp":{"ready":true}}})
        );
        let (_, metrics) = get_text(&router, "/metrics").await;
        assert!(metrics.contains(r#"broadcastd_ready{dependency="redis"} 0"#));
        assert!(metrics.contains(r#"broadcastd_ready{dependency="amqp"} 1"#));

        redis.send(Ok(())).unwrap();
        drop(amqp);
        assert_eq!(get_text(&router, "/readyz").await.0, 503, "a part that stopped is not ready");
        let _ = drain;
    }

    #[tokio::test]
    async fn while_draining_it_is_not_ready_but_alive() {
        let (drain, draining) = watch::channel(false);
        let router = router(Vec::new(), draining, Metrics::new().unwrap());
        assert_eq!(get_text(&router, "/readyz").await.0, 200);
        drain.send(true).unwrap();
        assert_eq!(get_text(&router, "/readyz").await.0, 503);
        assert_eq!(get_text(&router, "/healthz").await, (StatusCode::OK, "ok\n".to_owned()));
    }
}
