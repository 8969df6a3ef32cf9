// Connects, says which trace the connection serves, sends a line, and prints what setsockopt and the peer answered.
//
//     node tag.js HOST PORT TRACE_ID SPAN_ID [NAME]
//
// As tag.c beside it. Node has no setsockopt of its own, so koffi calls that of libc; NODE_PATH says where koffi is.
"use strict";

const net = require("node:net");
const koffi = require("koffi");

const OTEL_LEVEL = 0x6f74656c; // "otel"

const setsockopt = koffi
  .load(null)
  .func("int setsockopt(int fd, int level, int name, const uint8_t *value, uint32_t size)");

const [host, port, traceId = "", spanId = "", name = "1"] = process.argv.slice(2);
if (!/^[0-9a-f]{32}$/.test(traceId) || !/^[0-9a-f]{16}$/.test(spanId)) {
  console.error("usage: node tag.js HOST PORT TRACE_ID SPAN_ID [NAME]");
  process.exit(2);
}
const context = Buffer.from(traceId + spanId, "hex");

const socket = net.connect({ host, port: Number(port) }, () => {
  // The descriptor is a detail of Node's; it is -1 on a socket that is not connected.
  const refused = setsockopt(socket._handle.fd, OTEL_LEVEL, Number(name), context, context.length);
  console.log(refused ? koffi.errno() : 0);
  socket.write("hello\n");
});
let answer = "";
socket.on("data", (bytes) => {
  answer += bytes;
  if (answer.includes("\n")) {
    process.stdout.write(answer);
    socket.end();
  }
});
socket.on("error", (error) => {
  console.error(`connect: ${error.message}`);
  process.exitCode = 1;
});
