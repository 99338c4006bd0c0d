-- One step of a run, whole or not at all: state, events, log lines, outbox, deadline, indexes.
--
--   KEYS[2]  run       hash    spec, state, version, lines (the log's length)
--   KEYS[3]  events    list    of the run, in order: the step's command id (16 bytes), the event
--   KEYS[4]  log       zset    packed entries by the offset of the first; see append.lua
--   KEYS[5]  outbox    zset    steps to be published, by when they were committed (ms)
--   KEYS[6]  due       zset    runs by their deadline (s)
--   KEYS[7]  owners    hash    how many live runs each agent owns
--   KEYS[8…] indexes   zset    run numbers; first those the run joins, then those it leaves
--   ARGV     2 command id  3 the version the step was made for (0: the run is new)  4 number
--            5 state  6 spec, '' unless new  7 deadline or ''  8 agent before or ''
--            9 agent after or ''  10 packed lines or ''  11 their count  12 outbox member
--            13 how many indexes it joins  14… events
-- Returns {'done', log length} | {'stale', spec, state}: it is at another version | {'absent'}.
local before = tonumber(ARGV[3])
local known = redis.call('HMGET', KEYS[2], 'version', 'lines', 'spec', 'state')
if tonumber(known[1] or 0) ~= before then
  local event = redis.call('LINDEX', KEYS[3], before)
  if event and event:sub(1, 16) == ARGV[2] then
    return {'done', tonumber(known[2])}
  elseif not known[1] then
    return {'absent'}
  end
  return {'stale', known[3], known[4]}
end

local number = ARGV[4]
local length = tonumber(known[2] or 0)
if ARGV[10] ~= '' then
  redis.call('ZADD', KEYS[4], length, struct.pack('>I8', length) .. ARGV[10])
  length = length + ARGV[11]
end
redis.call('HSET', KEYS[2], 'state', ARGV[5], 'version', before + #ARGV - 13, 'lines', length)
if before == 0 then
  redis.call('HSET', KEYS[2], 'spec', ARGV[6])
end
for place = 14, #ARGV do
  redis.call('RPUSH', KEYS[3], ARGV[2] .. ARGV[place])
end
redis.call('ZADD', KEYS[5], now_ms(), ARGV[12])
if ARGV[7] ~= '' then
  redis.call('ZADD', KEYS[6], ARGV[7], number)
else
  redis.call('ZREM', KEYS[6], number)
end
if ARGV[8] ~= ARGV[9] then
  if ARGV[8] ~= '' and redis.call('HINCRBY', KEYS[7], ARGV[8], -1) <= 0 then
    redis.call('HDEL', KEYS[7], ARGV[8])
  end
  if ARGV[9] ~= '' then
    redis.call('HINCRBY', KEYS[7], ARGV[9], 1)
  end
end
local joins = 7 + ARGV[13]
for place = 8, #KEYS do
  if place <= joins then
    redis.call('ZADD', KEYS[place], number, number)
  else
    redis.call('ZREM', KEYS[place], number)
  end
end
return {'done', length}
