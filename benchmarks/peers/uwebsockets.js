// uWebSockets (C++) with its own topics.
// Usage: node uwebsockets.js WEBSOCKET-PATH CONTROL-PATH. A client subscribes to the channel that its path names.
'use strict';

const uws = require('uwebsockets');
const control = require('./control.js');

const app = uws.App().ws('/*', {
  compression: uws.DISABLED,
  idleTimeout: 0,
  maxBackpressure: 64 * 1024 * 1024,
  upgrade: (response, request, context) =>
    response.upgrade(
      { channel: request.getUrl().slice(1) },
      request.getHeader('sec-websocket-key'),
      request.getHeader('sec-websocket-protocol'),
      request.getHeader('sec-websocket-extensions'),
      context,
    ),
  open: (client) => client.subscribe(client.getUserData().channel),
});

app.listen_unix((listening) => {
  if (!listening) process.exit(1);
}, process.argv[2]);
control.listen(process.argv[3], (channel, message) => app.publish(channel, message, false));
