//! The console: a page that is a device in the browser.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

const PAGE: &str = include_str!("console.html");

/// Serves it. Its script and style run by a nonce of this answer; nothing else does.
pub(super) async fn page() -> Response {
    let nonce = Uuid::new_v4().simple().to_string();
    // `connect-src` is wide because the devices' address may be another host than the API's.
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self' ws: wss:; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store".to_owned()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (REFERRER_POLICY, "no-referrer".to_owned()),
    ];
    (headers, PAGE.replace("{{nonce}}", &nonce)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_policy_admits_the_pages_own_script_only() {
        let response = page().await;
        let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
        let nonce = policy.split("script-src 'nonce-").nth(1).unwrap().split('\'').next().unwrap().to_owned();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        assert_eq!(text.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "one style, one script");
        assert!(!text.contains("{{nonce}}"));
        // An inline handler or style would silently not work, an outside address would leak the reader's visit.
        for forbidden in [" onclick=", " style=\"", "http://", "https://", "innerHTML"] {
            assert!(!text.contains(forbidden), "{forbidden}");
        }
    }
}
