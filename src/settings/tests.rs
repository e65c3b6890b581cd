use super::*;

fn with(overrides: &[(&str, &str)]) -> Sources {
    let overrides = overrides.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Sources { overrides, ..Sources::default() }
}

#[test]
fn the_defaults_load() {
    let settings = Settings::load(&Sources::default()).unwrap();
    assert_eq!(settings.amqp.prefetch, 512);
    assert!(settings.directory().unwrap().is_empty());
}

#[test]
fn dev_knows_one_app() {
    let settings = Settings::load(&Sources { dev: true, ..Sources::default() }).unwrap();
    assert!(settings.node.tokenless_login);
    assert!(settings.directory().unwrap().get("demo").unwrap().broadcast);
}

#[test]
fn an_unknown_key_and_a_bad_value_are_errors() {
    for bad in [
        ("node.shard", "1"),
        ("nodes", "1"),
        ("amqp.prefetch", "many"),
        ("amqp.prefetch", "0"),
        ("ledger.log_length", "100001"),
    ] {
        assert!(Settings::load(&with(&[bad])).is_err(), "{bad:?}");
    }
}

#[test]
fn a_file_adds_apps_and_wrong_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    let load = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Settings::load(&Sources { file: Some(path.clone()), ..Sources::default() })
    };
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "s3cret\n").unwrap();
    let settings =
        load(&format!("[[apps]]\nkey = \"Shop\"\nsecret_file = {:?}\nper_minute = 3\n", secret.to_string_lossy()))
            .unwrap();
    let directory = settings.directory().unwrap();
    let app = directory.get("Shop").unwrap();
    assert_eq!(app.secret.expose_secret(), "s3cret");
    assert_eq!((app.limits.per_minute, app.limits.per_day), (3, 1000));
    assert!(load("[[apps]]\nkey = \"a b\"\nsecret = \"x\"\n").unwrap_err().to_string().contains("a b"));
    assert!(load("[[apps]]\nkey = \"a\"\n").unwrap_err().to_string().contains("secret"));
    let broken = load("[[apps]]\nkey = \"a\"\nsecret = \"hunter2\n").unwrap_err().to_string();
    assert!(!broken.contains("hunter2") && broken.contains("line 3"), "{broken}");
    assert!(load("[[apps]]\nkey=\"a\"\nsecret=\"x\"\n[[apps]]\nkey=\"a\"\nsecret=\"y\"\n").is_err());
}

#[test]
fn what_stands_in_the_wrong_place_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    let app = "[[apps]]\nkey = \"a\"\nsecret = \"x\"\n";
    for (text, key) in [
        ("amqp = \"amqp://u:hunter2@h\"", "amqp"),
        ("amqp.prefetch = \"hunter2\"", "amqp.prefetch"),
        ("redis.mode = \"hunter2\"", "redis.mode"),
        ("redis.url = { hunter2 = 1 }", "redis.url"),
        ("redis.url = [\"hunter2\"]", "redis.url"),
        ("node.tokenless_login = \"hunter2\"", "node.tokenless_login"),
        ("node.allowed_origins = \"hunter2\"", "node.allowed_origins"),
        ("listen.admin = \"hunter2\"", "listen.admin"),
        ("apps = \"hunter2\"", "apps"),
        (&format!("{app}per_minute = \"hunter2\""), "apps[0]per_minute"),
        (&format!("{app}broadcast = \"a\\\"hunter2\""), "apps[0]broadcast"),
        (&format!("{app}secret_file = [\"hunter2\"]"), "apps[0]secret_file"),
    ] {
        std::fs::write(&path, text).unwrap();
        let said = Settings::load(&Sources { file: Some(path.clone()), ..Sources::default() }).unwrap_err().to_string();
        assert!(!said.contains("hunter2") && said.contains(&format!("for key `{key}`")), "{text}: {said}");
    }
    std::fs::write(&path, "redis.sentinel_password = 20002").unwrap();
    let text = effective(&Sources { file: Some(path), ..Sources::default() }).unwrap();
    assert!(!text.contains("20002") && text.contains("sentinel_password = \"[redacted]\""), "{text}");
}

#[test]
fn secrets_are_never_printed() {
    let sources = Sources {
        dev: true,
        overrides: vec![
            ("redis.url".into(), "redis://user:hunter2@localhost:1".into()),
            ("amqp.prefetch".into(), "100".into()),
        ],
        ..Sources::default()
    };
    let text = effective(&sources).unwrap();
    assert!(!text.contains("hunter2") && !text.contains("demo-secret") && !text.contains("guest:guest"), "{text}");
    assert_eq!(redact("amqp://u:pa,ss@word@h/%2f"), "amqp://[redacted]@h/%2f");
    assert_eq!(redact("redis://:a@h1,redis://:b@h2"), "redis://[redacted]@h1,redis://[redacted]@h2");
    for (url, printed) in [
        ("unix:///run/redis.sock?user=u&pass=hunter2", "unix:///run/redis.sock?[redacted]"),
        ("redis://h:1/0?password=hunter2", "redis://h:1/0?[redacted]"),
        ("redis://u:a@h:1/0?password=hunter2", "redis://[redacted]@h:1/0?[redacted]"),
        ("unix:///run/redis.sock?pass=hunter@2", "unix://[redacted]"),
        ("redis://u:hunter?2@h", "redis://[redacted]"),
        ("redis://h1?a=hunter2,redis://h2#hunter2", "redis://h1?[redacted],redis://h2#[redacted]"),
        ("u:hunter2@h", "[redacted]"),
        ("redis://h:1", "redis://h:1"),
    ] {
        assert_eq!(redact(url), printed);
    }
    let socket = with(&[("redis.url", "unix:///run/redis.sock?user=u&pass=hunter2")]);
    let shown = effective(&socket).unwrap();
    assert!(shown.contains("unix:///run/redis.sock?[redacted]") && !shown.contains("hunter2"), "{shown}");
    assert!(text.contains("prefetch = 100\n") && text.contains("redis://[redacted]@localhost:1"), "{text}");
    assert!(!format!("{:?}", Settings::load(&sources).unwrap()).contains("hunter2"));
}
