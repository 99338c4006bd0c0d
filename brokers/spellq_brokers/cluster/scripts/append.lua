-- Append an agent's entries to a run's log, once.
--
--   KEYS[2]  run       hash    lines (the log's length), raw (how far the raw output got, in bytes)
--   KEYS[3]  log       zset    packed entries by the offset of the first, which is their head, too
--   ARGV     2 packed entries  3 their count  4 the place in the raw output they reach, 0: none
-- Returns the log's new length; what reaches no further than the log did is there already.
local known = redis.call('HMGET', KEYS[2], 'lines', 'raw')
local length = tonumber(known[1] or 0)
if ARGV[4] ~= '0' then
  if tonumber(ARGV[4]) <= tonumber(known[2] or 0) then
    return length
  end
  redis.call('HSET', KEYS[2], 'raw', ARGV[4])
end
redis.call('ZADD', KEYS[3], length, struct.pack('>I8', length) .. ARGV[2])
return redis.call('HINCRBY', KEYS[2], 'lines', ARGV[3])
