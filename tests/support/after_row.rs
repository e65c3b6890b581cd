//! What must hold after every row of the fault table, decided from all that was sent and told (the apps' journals) and from what
//! Redis holds. What devices had is the row's own to decide: only it knows which of them were online.

use super::broadcastd::App;
use super::checker::Checker;
use super::redis::LOGIN;
use super::stack::Stack;
use super::stored::{Stored, connect};
use super::{SOON, now_ms, until};

/// The log's length by default.
const LOG_KEEPS: usize = 10_000;

/// I1 and I2 and I6 of everything that was sent for the stack's apps by its clients, and what is retained (I4). Returns a
/// checker that knows all of it, for the devices. Call it when nothing is under way any more.
pub async fn after_row(stack: &Stack) -> Checker {
    after_row_with_log(stack, LOG_KEEPS).await
}

/// The same where the log keeps so many.
pub async fn after_row_with_log(stack: &Stack, log_keeps: usize) -> Checker {
    let mut checker = told(&stack.apps);
    for app in &stack.apps {
        let stored = read(stack, &app.key).await;
        checker.stored(&app.key, &stored, log_keeps, now_ms()).unwrap();
    }
    dead_letters(stack, &mut checker).await;
    ended(&stack.apps, &checker);
    checker
}

/// The same where Redis has lost what it wrote last, so that neither its log nor its counters must have everything. What is
/// promised then: every request has an end, one verdict each, no id is used twice, ids increase.
pub async fn after_lost_data(stack: &Stack) -> Checker {
    let mut checker = told(&stack.apps);
    dead_letters(stack, &mut checker).await;
    ended(&stack.apps, &checker);
    checker
}

/// The same for the embedded store, which only its process can look into.
pub fn after_row_without_redis(apps: &[App]) -> Checker {
    let checker = told(apps);
    ended(apps, &checker);
    checker
}

fn told(apps: &[App]) -> Checker {
    let mut checker = Checker::default();
    apps.iter().try_for_each(|app| checker.journal(&app.journal)).unwrap();
    checker
}

/// What has no end yet may be a dead letter that nobody has looked at.
async fn dead_letters(stack: &Stack, checker: &mut Checker) {
    if checker.every_request_ended().is_err() {
        checker.dead_letters(&stack.amqp().await.dead_letters().await);
    }
}

fn ended(apps: &[App], checker: &Checker) {
    checker.every_request_ended().unwrap();
    checker.in_order_of_acceptance().unwrap();
    for app in apps {
        checker.within_limit(&app.key, app.per_minute as usize).unwrap();
    }
}

/// From whichever of the stack's servers has the app's slot.
async fn read(stack: &Stack, app: &str) -> Stored {
    until("read from Redis", SOON, async || {
        let mut why = String::new();
        for url in stack.redis_url.split(',') {
            // The tests' own user: the service's may not look at everything at once.
            let answer = match connect(&url.replace(&format!("{LOGIN}@"), "")).await {
                Ok(mut connection) => Stored::read(&mut connection, &stack.prefix, app).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(stored) => return Ok(stored),
                Err(error) => why = error,
            }
        }
        Err(why)
    })
    .await
}
