use super::*;
use tokio::net::TcpListener;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

fn login(url: String) -> Login {
    Login {
        url,
        app: "demo".to_owned(),
        account: "ada".to_owned(),
        device: "d-1".to_owned(),
        platform: "web".to_owned(),
        token: None,
        since: 0,
    }
}

/// Takes one device in, gives back its login frame, and says `frames`.
async fn serve_one(listener: &TcpListener, frames: &[&str]) -> (serde_json::Value, WebSocketStream<TcpStream>) {
    let (stream, _) = listener.accept().await.unwrap();
    let mut socket = accept_async(stream).await.unwrap();
    let login = socket.next().await.unwrap().unwrap();
    for frame in frames {
        socket.send(Message::text(*frame)).await.unwrap();
    }
    (serde_json::from_str(login.to_text().unwrap()).unwrap(), socket)
}

#[tokio::test]
async fn it_comes_back_with_its_cursor_after_the_pause_that_the_server_asks_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut device = Device::new(login(format!("ws://{}/ws", listener.local_addr().unwrap())));
    let server = async {
        let (login, mut socket) = serve_one(
            &listener,
            &[
                r#"{"type":"welcome","session":"s","head":9}"#,
                r#"{"type":"news","of":"a newer server"}"#,
                r#"{"type":"broadcast","id":7,"fromAccount":"ops","time":5,"content":"hi"}"#,
                r#"{"type":"recall","id":8}"#,
            ],
        )
        .await;
        assert_eq!((&login["type"], &login["since"]), (&"login".into(), &0.into()));
        let close = CloseFrame { code: 1012.into(), reason: r#"{"reconnectAfterMs":1}"#.into() };
        socket.close(Some(close)).await.unwrap();
        let (login, socket) = serve_one(&listener, &[r#"{"type":"error","code":403,"desc":"token expired"}"#]).await;
        assert_eq!(login["since"], 7);
        socket
    };
    let client = async {
        assert_eq!(device.next().await.unwrap(), Happening::Welcome(9));
        let Happening::Broadcast(broadcast) = device.next().await.unwrap() else { panic!("a broadcast") };
        assert_eq!((broadcast.id, broadcast.content.as_str()), (7, "hi"));
        assert_eq!(device.next().await.unwrap(), Happening::Recall(8));
        let Happening::Away(_, pause) = device.next().await.unwrap() else { panic!("away") };
        assert_eq!(pause, Duration::from_millis(1));
        let refused = device.next().await.unwrap_err();
        assert_eq!(refused.to_string(), "the server refuses this device (403): token expired");
    };
    let _ = tokio::join!(server, client);
}

/// A welcome's head is the cursor once the pending broadcasts are in, and not before.
#[tokio::test]
async fn the_head_is_the_cursor_once_the_pending_broadcasts_are_in() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut device = Device::new(login(format!("ws://{}/ws", listener.local_addr().unwrap())));
    let broadcast = |id: u64| format!(r#"{{"type":"broadcast","id":{id},"fromAccount":"","time":5,"content":"hi"}}"#);
    let (three, seven, thirty) = (broadcast(3), broadcast(7), broadcast(30));
    let rounds: [(u64, Vec<&str>); 5] = [
        (0, vec![r#"{"type":"welcome","session":"s","head":1,"pending":0}"#]),
        (1, vec![r#"{"type":"welcome","session":"s","head":9,"pending":2}"#, &three]),
        (3, vec![r#"{"type":"welcome","session":"s","head":9,"pending":1}"#, &seven]),
        (9, vec![r#"{"type":"welcome","session":"s","head":20,"pending":0}"#, &thirty]),
        (30, vec![r#"{"type":"welcome","session":"s","head":2,"pending":0}"#]),
    ];
    let server = async {
        for (since, frames) in &rounds {
            let (login, mut socket) = serve_one(&listener, frames).await;
            assert_eq!(login["since"], *since);
            let close = CloseFrame { code: 1012.into(), reason: r#"{"reconnectAfterMs":1}"#.into() };
            socket.close(Some(close)).await.unwrap();
        }
        let (login, _) = serve_one(&listener, &[r#"{"type":"error","code":403,"desc":"over"}"#]).await;
        assert_eq!(login["since"], 30, "an older head does not move the cursor back");
    };
    let client = async { while device.next().await.is_ok() {} };
    let _ = tokio::join!(server, client);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_tried_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/ws", listener.local_addr().unwrap());
    drop(listener);
    let Ok(Happening::Away(why, _)) = Device::new(login(url)).next().await else { panic!("away") };
    assert!(why.starts_with("the connection failed: "), "{why}");
}

#[test]
fn a_servers_wish_is_kept_within_bounds() {
    assert_eq!(wish(r#"{"reconnectAfterMs":250}"#), Some(Duration::from_millis(250)));
    assert_eq!(wish(r#"{"reconnectAfterMs":99999999}"#), Some(LONGEST_WISH));
    assert_eq!(wish("going away"), None);
}
