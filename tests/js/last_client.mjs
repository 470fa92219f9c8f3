/**
 * A page that opens with the newest messages: it tells them on standard output, with their times.
 *
 *     node last_client.mjs ws://127.0.0.1:8000/ws '{"last": 3}' news
 */

import { Realtime } from '../../app/realtime.js';

const [url, options, channel] = process.argv.slice(2);

new Realtime(url).subscribe(
  channel,
  (message, { replayed, time }) => console.log(JSON.stringify({ message, replayed, time })),
  JSON.parse(options),
);
