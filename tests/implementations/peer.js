// The zeromq package of npm as peer.py has it: node peer.js TYPE bind|connect ENDPOINT OPTIONS

const zmq = require("zeromq")

const TYPES = {
  PUSH: zmq.Push, PULL: zmq.Pull, PUB: zmq.Publisher, SUB: zmq.Subscriber, DEALER: zmq.Dealer,
}
const [type, how, endpoint, json] = process.argv.slice(2)
const options = JSON.parse(json)

// Yields the messages that are whole, as they come.
async function* messages(stream) {
  let data = Buffer.alloc(0)
  for await (const chunk of stream) {
    data = Buffer.concat([data, chunk])
    let end
    while ((end = endOfMessage(data)) > 0) {
      const parts = []
      for (let at = 4; at < end; at += 4 + data.readUInt32BE(at)) {
        parts.push(Buffer.from(data.subarray(at + 4, at + 4 + data.readUInt32BE(at))))
      }
      yield parts
      data = data.subarray(end)
    }
  }
}

function endOfMessage(data) {
  if (data.length < 4) return 0
  let at = 4
  for (let parts = data.readUInt32BE(0); parts > 0; parts--) {
    if (at + 4 > data.length) return 0
    at += 4 + data.readUInt32BE(at)
  }
  return at <= data.length ? at : 0
}

function number(value) {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}

async function main() {
  const socket = new TYPES[type]()
  if (options.secret) {
    socket.curvePublicKey = options.public
    socket.curveSecretKey = options.secret
    if (options.server) socket.curveServerKey = options.server
    else socket.curveServer = true
  }
  if (how === "bind") await socket.bind(endpoint)
  else socket.connect(endpoint)
  if (type === "PUSH") {
    for await (const message of messages(process.stdin)) await socket.send(message)
  } else if (type === "PULL") {
    for await (const parts of socket) {
      const pieces = parts.flatMap((part) => [number(part.length), part])
      process.stdout.write(Buffer.concat([number(parts.length), ...pieces]))
    }
  } else {
    setInterval(() => {}, 1000)
  }
}

main()
