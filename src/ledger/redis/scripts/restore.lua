-- Writes back what a node still holds and Redis has lost: the head, so that no id is reused, and retained broadcasts, of which
-- the other nodes are told: one that read in between would not know that there is more.
--
-- KEYS meta, log, retained, nodes
-- ARGV head, publish command, channel prefix, number of recalled ids, recalled id…, retained envelope…
-- Returns how many retained broadcasts were missing and are kept

local now_ms = math.floor(now_us() / 1000)
local meta = redis.call('GET', KEYS[1])
local head, generation, previous, next_expiry = parse_meta(meta, KEYS[2])
redis.call('ZCARD', KEYS[3]) -- only for its type check
local nodes = live_nodes(KEYS[4], now_ms)

local recalled = {}
for i = 5, 4 + tonumber(ARGV[4]) do
  recalled[ARGV[i]] = true
  redis.call('ZREMRANGEBYSCORE', KEYS[3], ARGV[i], ARGV[i])
end
-- What was deleted after what the node knows must not come back with it.
local later = redis.call('XRANGE', KEYS[2], '(' .. ARGV[1] .. '-0', '+')
for i = 1, #later do
  local target = string.match(later[i][2][2], '"recall":(%d+)}$')
  if target then
    recalled[target] = true
    redis.call('ZREMRANGEBYSCORE', KEYS[3], target, target)
  end
end
prune(KEYS[3], now_ms)
local added = {}
for i = 5 + tonumber(ARGV[4]), #ARGV do
  local id, _, _, expires = string.match(ARGV[i], HEADER)
  expires = tonumber(expires) or 0
  if id and expires > now_ms and not recalled[id] and #redis.call('ZRANGE', KEYS[3], id, id, 'BYSCORE') == 0 then
    retain(KEYS[3], tonumber(id), ARGV[i], expires - now_ms)
    added[#added + 1] = id
  end
end
local kept = 0
for i = 1, #added do
  local envelope = redis.call('ZRANGE', KEYS[3], added[i], added[i], 'BYSCORE')[1]
  if envelope then
    kept = kept + 1
    publish(ARGV[2], ARGV[3], nodes, envelope)
  end
end
-- next expiry 0: the next acceptance looks for itself. Without a meta the generation stays unknown: ids will jump.
redis.call('SET', KEYS[1], format_meta(math.max(head, math.min(tonumber(ARGV[1]), NEVER)), generation, previous, 0))
return kept
