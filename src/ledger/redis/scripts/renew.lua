-- Renews a node's lease and tells it the app's newest id, by which it notices what it has missed.
--
-- KEYS meta, log, nodes
-- ARGV node, lease ms
-- Returns {now ms, head}

local now_ms = math.floor(now_us() / 1000)
local head = parse_meta(redis.call('GET', KEYS[1]), KEYS[2])
redis.call('ZADD', KEYS[3], text(now_ms + tonumber(ARGV[2])), ARGV[1])
redis.call('PEXPIRE', KEYS[3], 2 * tonumber(ARGV[2]) + SLACK)
return { now_ms, head }
