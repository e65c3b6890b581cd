//! The floor: the least that any worker on these servers does. The same consume, the same acknowledgements by runs, one call of
//! the same script for each delivery; no parsing, no checks, no verdicts, no logs. Run as a process of its own.

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use redis::{IntoConnectionInfo, Pipeline};

const TAIL: &str = r#""requestId":"00000000","from":"ops","body":"Maintenance tonight from 22:00 to 23:00 UTC. Please save your work."}"#;

/// `amqp url, redis url, key prefix, apps`
pub async fn run(arguments: &[String]) {
    let [amqp, redis_url, prefix, apps] = arguments else { panic!("four arguments") };
    let apps: u64 = apps.parse().unwrap();
    let info = redis_url.as_str().into_connection_info().unwrap();
    let nodelay = redis::io::tcp::TcpSettings::default().set_nodelay(true);
    let client = redis::Client::open(info.set_tcp_settings(nodelay)).unwrap();
    let mut redis = client.get_multiplexed_async_connection().await.unwrap();
    let sha: String = redis::cmd("SCRIPT")
        .arg("LOAD")
        .arg(broadcastd::ledger::redis::accept_script())
        .query_async(&mut redis)
        .await
        .unwrap();
    let keys: Vec<[String; 7]> = (0..apps)
        .map(|app| {
            ["meta", "rate:minute", "rate:day", "request:", "retained", "log", "nodes"]
                .map(|key| format!("{prefix}{{bench-{app}}}:{key}"))
        })
        .collect();
    let channels: Vec<String> = (0..apps).map(|app| format!("{prefix}{{bench-{app}}}:node:")).collect();

    let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.basic_qos(512, BasicQosOptions::default()).await.unwrap();
    let mut consumer = channel
        .basic_consume(
            "broadcast.requests".into(),
            "floor".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let mut work = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some(tag) = work.next() => {
                channel.basic_ack(tag, BasicAckOptions { multiple: true }).await.unwrap();
            }
            delivery = consumer.next(), if work.len() < 8 => {
                let mut tags = vec![delivery.unwrap().unwrap().delivery_tag];
                while tags.len() < 64 && let Some(delivery) = consumer.next().now_or_never() {
                    tags.push(delivery.unwrap().unwrap().delivery_tag);
                }
                let mut pipeline = Pipeline::with_capacity(tags.len());
                for tag in &tags {
                    #[allow(clippy::cast_possible_truncation)]
                    let app = (tag % apps) as usize;
                    let [meta, minute, day, request, retained, log, nodes] = &keys[app];
                    pipeline
                        .cmd("EVALSHA").arg(&sha).arg(7)
                        .arg(meta).arg(minute).arg(day).arg(format!("{request}{tag}")).arg(retained).arg(log).arg(nodes)
                        .arg("0123456789abcdef").arg("00112233445566778899aabbccddeeff").arg(604_800_000)
                        .arg(4_000_000_000_u32).arg(4_000_000_000_u32).arg(0).arg(TAIL).arg("PUBLISH")
                        .arg(&channels[app]).arg(1000).arg(604_800_000);
                }
                let mut redis = redis.clone();
                let count = tags.len();
                let last = tags[count - 1];
                work.push(async move {
                    redis.send_packed_commands(&pipeline, 0, count).await.unwrap();
                    last
                });
            }
        }
    }
}
