//! A signed call of the server API.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use secrecy::SecretString;
use serde_json::Value;
use uuid::Uuid;

use crate::api::signature::check_sum;

/// How long a call may take in all.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Who calls, and where.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The server's base address, such as `http://127.0.0.1:8080`.
    pub url: String,
    /// The app's key.
    pub app: String,
    /// The app's secret.
    pub secret: SecretString,
}

impl Caller {
    /// Calls `path` with these parameters; the answer is the JSON, whatever its code.
    ///
    /// # Errors
    /// If the server cannot be reached or does not answer as this API does.
    pub async fn call(&self, path: &'static str, parameters: Vec<(&'static str, String)>) -> anyhow::Result<Value> {
        let caller = self.clone();
        tokio::task::spawn_blocking(move || caller.call_blocking(path, &parameters)).await.context("the call failed")?
    }

    pub(super) fn call_blocking(&self, path: &str, parameters: &[(&str, String)]) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let nonce = Uuid::new_v4().simple().to_string();
        let cur_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
        let mut response = agent()
            .post(&url)
            .header("AppKey", &self.app)
            .header("Nonce", &nonce)
            .header("CurTime", &cur_time)
            .header("CheckSum", check_sum(&self.secret, &nonce, &cur_time))
            .content_type("application/x-www-form-urlencoded;charset=utf-8")
            .send(serde_urlencoded::to_string(parameters)?)
            .with_context(|| format!("{} cannot be reached", self.url))?;
        let status = response.status();
        let text = response.body_mut().read_to_string().with_context(|| format!("{} broke off", self.url))?;
        serde_json::from_str(&text)
            .ok()
            .filter(Value::is_object)
            .with_context(|| format!("{} is no broadcastd server API: HTTP {status}", self.url))
    }
}

/// An HTTP client whose errors are transport errors only.
pub(super) fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).build().into()
}
