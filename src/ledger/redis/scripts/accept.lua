-- The commit point: a request becomes a broadcast here or not at all. Everything is read, and so type-checked, before the
-- first write: a script is atomic but does not roll back.
--
-- KEYS meta, rate:minute, rate:day, request, retained, log, nodes
-- ARGV generation, content hash, dedupe ms, per minute, per day, ttl ms (0: online only), envelope tail, publish command,
--      channel prefix, log length, log ms
-- Returns {1, id, time ms, expires ms, targeted, reached, repeated} | {2} conflict | {3, 1 minute or 2 day, retry after s}

local BUCKETS = 61
local RING_BYTES = 12 + 4 * BUCKETS
local RING = '>' .. string.rep('I4', BUCKETS)

local now = now_us()
local now_ms = math.floor(now / 1000)
local now_second = math.floor(now / 1000000)
local state = redis.call('MGET', KEYS[4], KEYS[1], KEYS[2], KEYS[3])

-- 1. Seen before: the stored verdict.
if state[1] then
  local until_ms, hash, id, time, expires, targeted, reached =
    string.match(state[1], '^(%d+) (%x+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
  if until_ms and tonumber(until_ms) > now_ms then
    if hash ~= ARGV[2] then
      return { 2 }
    end
    return { 1, tonumber(id), tonumber(time), tonumber(expires), tonumber(targeted), tonumber(reached), 1 }
  end
end

-- 2. The quota. The same rule as quota.rs: 61 buckets of a second, as "second, sum, bucket[second mod 61]".
local second, sum, ring = now_second, 0, nil
if state[3] and #state[3] == RING_BYTES then
  second, sum = struct.unpack('>I8I4', state[3])
  if second >= now_second then
    ring = state[3] -- the hot path: the same second as last time
  elseif now_second - second < BUCKETS then
    local buckets = { struct.unpack(RING, state[3], 13) }
    for passed = second + 1, now_second do
      local slot = passed % BUCKETS + 1
      sum = sum - buckets[slot]
      buckets[slot] = 0
    end
    buckets[BUCKETS + 1] = nil -- struct.unpack also returns the position after
    ring = struct.pack('>I8I4', now_second, sum) .. struct.pack(RING, unpack(buckets))
    second = now_second
  else
    second, sum = now_second, 0
  end
end
if not ring then
  ring = struct.pack('>I8I4', second, 0) .. string.rep('\0', 4 * BUCKETS)
end

local day, day_count = math.floor(now_second / 86400), 0
if state[4] then
  local stored_day, stored_count = string.match(state[4], '^(%d+) (%d+)$')
  stored_day = tonumber(stored_day)
  if stored_day and stored_day >= day then
    day, day_count = stored_day, tonumber(stored_count)
  end
end
if day_count >= tonumber(ARGV[5]) then
  return { 3, 2, math.max((day + 1) * 86400 - now_second, 1) }
end

local per_minute = tonumber(ARGV[4])
if sum >= per_minute then
  local buckets = { struct.unpack(RING, ring, 13) }
  for oldest = second + 1 - BUCKETS, second do
    sum = sum - buckets[oldest % BUCKETS + 1]
    if sum < per_minute then
      return { 3, 1, math.max(oldest + BUCKETS - now_second, 1) }
    end
  end
  return { 3, 1, BUCKETS }
end

-- 3. The id.
local head, generation, previous, next_expiry = parse_meta(state[2], KEYS[6])
local id
id, generation, previous = allocate(head, generation, previous, ARGV[1], now)

local nodes = live_nodes(KEYS[7], now_ms)
local ttl = tonumber(ARGV[6])
local expires = ttl > 0 and now_ms + ttl or 0
if ttl > 0 then
  redis.call('ZCARD', KEYS[5]) -- only for its type check
end

-- 4. Store. The log first: if its key had another type, nothing would have been written.
local envelope = '{"v":1,"id":' .. text(id) .. ',"prev":' .. text(head) .. ',"time":' .. text(now_ms)
  .. ',"expires":' .. text(expires) .. ',' .. ARGV[7]
append(KEYS[6], id, envelope, ARGV[10], tonumber(ARGV[11]))
if ttl > 0 then
  if next_expiry <= now_ms then
    next_expiry = prune(KEYS[5], now_ms)
  end
  retain(KEYS[5], id, envelope, ttl)
  next_expiry = math.min(next_expiry, expires)
end
local bucket = 12 + 4 * (second % BUCKETS)
local count = struct.unpack('>I4', ring, bucket + 1)
redis.call('SET', KEYS[2], struct.pack('>I8I4', second, sum + 1) .. string.sub(ring, 13, bucket)
  .. struct.pack('>I4', count + 1) .. string.sub(ring, bucket + 5), 'PX', 62000 + SLACK)
redis.call('SET', KEYS[3], text(day) .. ' ' .. text(day_count + 1), 'PX', 86400000 + SLACK)
redis.call('SET', KEYS[1], format_meta(id, generation, previous, next_expiry))

-- 5. Publish, and 6. remember the verdict.
local reached = publish(ARGV[8], ARGV[9], nodes, envelope)
redis.call('SET', KEYS[4], text(now_ms + tonumber(ARGV[3])) .. ' ' .. ARGV[2] .. ' ' .. text(id) .. ' ' .. text(now_ms)
  .. ' ' .. text(expires) .. ' ' .. #nodes .. ' ' .. reached, 'PX', ARGV[3] + SLACK)
return { 1, id, now_ms, expires, #nodes, reached, 0 }
