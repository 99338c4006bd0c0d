-- The runs of a shard whose deadline has come, and the first deadline after.
--
--   KEYS[2]  due       zset    runs by their deadline (s)
--   ARGV     2 now (s)  3 how many at most
-- Returns {{number, deadline, …}, {number, deadline} of the next or {}}.
return {
  redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3]),
  redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[2], '+inf', 'WITHSCORES', 'LIMIT', 0, 1),
}
