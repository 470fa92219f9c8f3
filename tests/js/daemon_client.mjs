/**
 * A Realtime that meets a real daemon: it tells on standard output, one JSON object a line, what becomes of it.
 *
 *     node daemon_client.mjs ws://127.0.0.1:8000/ws '{"minDelay": 10}' news sport …
 */

import { Realtime } from '../../app/realtime.js';

const [url, options, ...channels] = process.argv.slice(2);
const say = line => console.log(JSON.stringify(line));

const realtime = new Realtime(url, JSON.parse(options));
realtime.addEventListener('state', ({ detail: { state, code, retryIn } }) => say({ state, code, retryIn }));
realtime.addEventListener('error', event => {
  event.preventDefault();
  say({ error: event.detail.code, message: event.detail.message });
});

for (const channel of channels) {
  realtime.subscribe(
    channel,
    (message, { offset, replayed }) => {
      const content = typeof message === 'string' ? { text: message } : { bytes: [...message] };
      say({ message: channel, offset, replayed, ...content });
    },
    {
      onSubscribed: ({ recovered, replayed }) => say({ subscribed: channel, recovered, replayed }),
      onError: ({ code }) => say({ refused: channel, code }),
    },
  );
}
