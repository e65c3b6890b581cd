//! The benchmark: `./tests/run bench` (all of it), or `./tests/run bench worker|latency|growth|scale|node`.
//!
//! It starts RabbitMQ and Redis of its own and runs the release binary's roles as processes. Figures are compared within one
//! run, side by side with the floor, because the speed of a shared machine drifts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that cannot go on should say where and stop")]

mod drain;
mod floor;
mod growth;
mod latency;
mod machine;
mod node;
mod scale;
#[path = "../../tests/support/mod.rs"]
#[allow(clippy::missing_panics_doc, reason = "shared with the tests")]
mod support;

fn main() {
    rustls::crypto::ring::default_provider().install_default().expect("installed once");
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match arguments.first().map(String::as_str) {
        // A runtime of one thread, like the worker's.
        Some("floor") => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(floor::run(&arguments[1..]));
        }
        Some("floor-node") => node::floor::run(&arguments[1..]),
        Some("node") => node::run(&runtime, &arguments[1..]),
        Some("scale") => scale::run(&runtime),
        Some("worker") => runtime.block_on(async {
            machine::describe();
            drain::run(&arguments[1..]).await
        }),
        Some("latency") => runtime.block_on(async {
            machine::describe();
            latency::run().await
        }),
        Some("growth") => runtime.block_on(async {
            machine::describe();
            growth::run().await
        }),
        None => {
            runtime.block_on(async {
                machine::describe();
                drain::run(&[]).await;
                latency::run().await;
                growth::run().await;
            });
            scale::run(&runtime);
            node::run(&runtime, &[]);
        }
        Some(other) => {
            eprintln!("unknown benchmark {other:?}: worker, latency, growth, scale, node, or nothing for all");
            std::process::exit(2);
        }
    }
}
