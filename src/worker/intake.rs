//! A delivery as it comes in: read, checked, its app looked up.

use lapin::message::Delivery;
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, DeliveryTag, ShortString};

use crate::broadcast::app::Directory;
use crate::broadcast::request::{Request, Submission};
use crate::broadcast::verdict::{Rejection, Verdict};

/// The header that the API sets: when it enqueued the request, milliseconds since the Unix epoch.
const ENQUEUED_AT: &str = "x-enqueued-at-ms";

/// One delivery on its way to being settled. It holds what a dead letter needs, so that nothing is lost.
pub(crate) struct Item {
    pub(crate) tag: DeliveryTag,
    pub(crate) reply_to: Option<ShortString>,
    pub(crate) correlation_id: Option<ShortString>,
    pub(crate) properties: AMQPProperties,
    pub(crate) payload: Vec<u8>,
    /// What was asked, where it could be read.
    pub(crate) request: Option<Request>,
    /// When it was enqueued, by the sender's clock, milliseconds since the Unix epoch.
    pub(crate) enqueued_at_ms: Option<u64>,
}

/// What intake makes of a delivery: a submission for the ledger, or a verdict already.
pub(crate) fn read(delivery: Delivery, directory: &Directory) -> (Item, Result<Submission, Verdict>) {
    let Delivery { delivery_tag, properties, data, .. } = delivery;
    let message_id = properties.message_id().as_ref().map(ShortString::as_str);
    let read = Request::from_json(&data, message_id);
    let mut item = Item {
        tag: delivery_tag,
        reply_to: properties.reply_to().clone().filter(|reply_to| !reply_to.as_str().is_empty()),
        correlation_id: properties.correlation_id().clone(),
        enqueued_at_ms: enqueued_at(&properties),
        properties,
        payload: data,
        request: None,
    };
    let rejected = |rejection: Rejection| Err(Verdict::Rejected(rejection));
    let outcome = match read.map(|request| Submission::new(request, directory)) {
        Err(rejection) => rejected(rejection),
        Ok(Err((request, rejection))) => {
            item.request = Some(*request);
            rejected(rejection)
        }
        Ok(Ok(submission)) => Ok(submission),
    };
    (item, outcome)
}

fn enqueued_at(properties: &AMQPProperties) -> Option<u64> {
    let header = properties.headers().as_ref().and_then(|headers| headers.inner().get(ENQUEUED_AT));
    match header {
        Some(AMQPValue::LongLongInt(ms)) => u64::try_from(*ms).ok(),
        Some(AMQPValue::Timestamp(ms)) => Some(*ms),
        _ => properties.timestamp().map(|seconds| seconds.saturating_mul(1000)),
    }
}
