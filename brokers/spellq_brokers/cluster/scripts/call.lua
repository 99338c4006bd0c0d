-- One command on one key, under the epoch.
--
--   KEYS[2]  the key
--   ARGV     2 command  3… its arguments after the key
return redis.call(ARGV[2], KEYS[2], unpack(ARGV, 3))
