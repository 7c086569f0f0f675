#!/bin/sh
# A real pipeline: zmqpush ships lines to zmqpull, which writes them to a file.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
endpoint="ipc://$dir/demo"
lines=100000

echo "\$ zmqpull --count $lines > arrived.ndjson &"
zmqpull --bind "$endpoint" --count "$lines" > "$dir/arrived.ndjson" &
echo "\$ python3 bench/generate.py $lines | zmqpush syslog"
python3 "$(dirname "$0")/generate.py" "$lines" | zmqpush --connect "$endpoint" syslog
wait
echo "\$ head -3 arrived.ndjson"
head -3 "$dir/arrived.ndjson"
echo "\$ wc -l < arrived.ndjson"
wc -l < "$dir/arrived.ndjson"
