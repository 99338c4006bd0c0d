-- Packed entries of a log, from those that hold an offset on.
--
--   KEYS[2]  log       zset    see append.lua
--   ARGV     2 offset  3 how many packs
local found = redis.call('ZREVRANGEBYSCORE', KEYS[2], ARGV[2], '-inf', 'LIMIT', 0, 1)
for _, pack in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[2], '+inf', 'LIMIT', 0, ARGV[3])) do
  found[#found + 1] = pack
end
return found
