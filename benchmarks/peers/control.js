// The control socket of the servers that run in Node: a message is a big-endian length (4 bytes), a channel (8 bytes)
// and the message itself; the length counts what follows it.
'use strict';

const net = require('node:net');

exports.listen = (path, broadcast) => {
  const server = net.createServer((socket) => {
    let held = Buffer.alloc(0);
    socket.on('error', () => {});
    socket.on('data', (data) => {
      held = held.length ? Buffer.concat([held, data]) : data;
      let at = 0;
      while (held.length - at >= 4 && held.length - at >= 4 + held.readUInt32BE(at)) {
        const end = at + 4 + held.readUInt32BE(at);
        broadcast(held.latin1Slice(at + 4, at + 12), held.subarray(at + 12, end));
        at = end;
      }
      held = held.subarray(at);
    });
  });
  server.listen(path);
};
