/**
 * A Realtime that meets a real daemon: it tells on standard output, one JSON object a line, what becomes of it.
 *
 *     node daemon_client.mjs ws://127.0.0.1:8000/ws news sport …
 */

import { Realtime } from '../../app/realtime.js';

const [url, ...channels] = process.argv.slice(2);
const say = line => console.log(JSON.stringify(line));

const realtime = new Realtime(url);
realtime.addEventListener('state', ({ detail: { state, code, retryIn } }) => say({ state, code, retryIn }));

for (const channel of channels) {
  realtime.subscribe(
    channel,
    (message, { offset }) => {
      const content = typeof message === 'string' ? { text: message } : { bytes: [...message] };
      say({ message: channel, offset, ...content });
    },
    {
      onSubscribed: ({ missed }) => say({ subscribed: channel, missed }),
      onError: ({ code }) => say({ refused: channel, code }),
    },
  );
}
