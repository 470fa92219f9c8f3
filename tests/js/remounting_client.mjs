/**
 * A page whose part keeps ending its subscription and making it anew in the same turn, from the last message it had, as
 * user interface frameworks do. It tells each message on standard output, and after the message `end` how often.
 *
 *     node remounting_client.mjs ws://127.0.0.1:8000/ws '{"rate": 20}' news
 */

import { Realtime } from '../../app/realtime.js';

const [url, options, channel] = process.argv.slice(2);
const say = line => console.log(JSON.stringify(line));

const realtime = new Realtime(url, JSON.parse(options));
let since;
let remounts = 0;
let missed = 0;
let ended = false;

function mount() {
  return realtime.subscribe(
    channel,
    (message, source) => {
      since = source;
      say({ message });
      ended = message === 'end';
      if (Math.random() < 0.01) {
        remount(); // within a handler, and in the middle of a burst
      }
    },
    {
      since,
      onSubscribed: subscribed => {
        missed += subscribed.missed ? 1 : 0;
        if (since === undefined) {
          say({ subscribed: true });
        }
      },
    },
  );
}

let unmount = mount();

function remount() {
  unmount();
  unmount = mount();
  remounts += 1;
}

const remounting = setInterval(() => {
  if (since !== undefined) {
    remount();
  }
  if (ended) {
    clearInterval(remounting);
    say({ remounts, missed });
    realtime.close();
  }
}, 7);
