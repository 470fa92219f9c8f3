// Node's `ws`: one loop over the clients of a channel, as its documentation shows for a broadcast; no compression.
// Usage: node ws.js WEBSOCKET-PATH CONTROL-PATH. A client subscribes to the channel that its path names.
'use strict';

const http = require('node:http');
const { WebSocketServer } = require('ws');
const control = require('./control.js');

const channels = new Map();
const server = http.createServer();
const websockets = new WebSocketServer({ server, perMessageDeflate: false, clientTracking: false });

websockets.on('connection', (client, request) => {
  const name = request.url.slice(1);
  if (!channels.has(name)) channels.set(name, new Set());
  const subscribers = channels.get(name);
  subscribers.add(client);
  client.on('close', () => subscribers.delete(client));
  client.on('error', () => {});
});

server.listen({ path: process.argv[2], backlog: 4096 });
control.listen(process.argv[3], (channel, message) => {
  for (const client of channels.get(channel) ?? []) client.send(message, { binary: false });
});
