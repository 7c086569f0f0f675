#!/bin/sh
# Two real pipelines from zmqpush to zmqpull: a plain one, and one whose receiver is killed.
set -eu
dir=$(mktemp -d)
trap 'kill $! 2> /dev/null || true; rm -rf "$dir"' EXIT
cd "$(dirname "$0")"
endpoint="ipc://$dir/demo"
lines=100000

echo "\$ zmqpull --count $lines > arrived.ndjson &"
zmqpull --bind "$endpoint" --count "$lines" > "$dir/arrived.ndjson" &
echo "\$ python3 bench/generate.py $lines | zmqpush syslog"
python3 generate.py "$lines" | zmqpush --connect "$endpoint" syslog
wait
echo "\$ head -3 arrived.ndjson"
head -3 "$dir/arrived.ndjson"
echo "\$ wc -l < arrived.ndjson"
wc -l < "$dir/arrived.ndjson"
echo

endpoint="ipc://$dir/acknowledged"
receive() {
    zmqpull --quiet --ack-bind "$endpoint" --state "$dir/state" --to "$dir/{type}.ndjson" &
    receiver=$!
}
echo "\$ zmqpull --state state --to '{type}.ndjson' &"
receive
echo "\$ (seq 1 $lines; sleep 1; seq $((lines + 1)) $((2 * lines))) | zmqpush --spool spool app &"
(seq 1 $lines; sleep 1; seq $((lines + 1)) $((2 * lines))) |
    zmqpush --spool "$dir/spool" --connect "$endpoint" app &
shipper=$!
while ! [ -s "$dir/app.ndjson" ]; do sleep 0.01; done
echo "\$ kill -9 %1; zmqpull --state state --to '{type}.ndjson' &"
kill -9 "$receiver"
wait "$receiver" 2> /dev/null || true
receive
wait "$shipper"
echo "\$ wc -l < app.ndjson; sort app.ndjson | uniq -d | wc -l"
wc -l < "$dir/app.ndjson"
sort "$dir/app.ndjson" | uniq -d | wc -l
kill "$receiver"
wait "$receiver"
