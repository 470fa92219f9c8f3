// socket.io with rooms, over its WebSocket transport; no compression.
// Usage: node socketio.js WEBSOCKET-PATH CONTROL-PATH. A client says which channel it wants when it connects.
'use strict';

const http = require('node:http');
const { Server } = require('socket.io');
const control = require('./control.js');

const server = http.createServer();
const io = new Server(server, { transports: ['websocket'], perMessageDeflate: false, pingInterval: 3_600_000 });

io.on('connection', (client) => client.join(client.handshake.auth.channel));

server.listen({ path: process.argv[2], backlog: 4096 });
control.listen(process.argv[3], (channel, message) => io.to(channel).emit('message', message.toString()));
