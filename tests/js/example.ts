/** All that app/realtime.js offers, as a program in TypeScript uses it. It is compiled, and never run. */

import { Realtime, RealtimeError } from '../../app/realtime.js';
import type {
  Clock,
  MessageHandler,
  Options,
  Position,
  RealtimeEvents,
  Source,
  State,
  Status,
  Subscribed,
  SubscribeOptions,
} from '../../app/realtime.js';

const clock: Clock = {
  now: () => performance.now(),
  setTimeout: (callback, delay) => setTimeout(callback, delay),
  clearTimeout: timer => clearTimeout(timer),
};

const options: Options = {
  minDelay: 500,
  maxDelay: 20_000,
  connectTimeout: 15_000,
  answerTimeout: 10_000,
  rate: 40,
  burst: 48,
  WebSocket,
  clock,
  random: Math.random,
  window,
};

const realtime = new Realtime(new URL('wss://example.org/ws'), options);
const target: EventTarget = realtime;

// Connection.

function inWords({ state, client, retryIn, code, reason }: Status): string {
  const words: Record<State, string> = {
    connecting: 'connecting',
    connected: `connected as ${client ?? '?'}`,
    waiting: `next try in ${Math.ceil((retryIn ?? 0) / 1000)} s`,
    offline: 'offline',
    closed: `closed: ${code?.toFixed() ?? ''} ${reason?.trim() ?? ''}`,
  };
  return words[state];
}

const showState = (event: RealtimeEvents['state']): void => console.log(inWords(event.detail));
realtime.addEventListener('state', showState);
realtime.addEventListener('state', event => console.log(event.detail.state), { once: true });
realtime.addEventListener('subscribed', ({ detail }) => console.log(detail.channel, detail.missed));
realtime.addEventListener('error', {
  handleEvent(event) {
    event.preventDefault();
    const error: RealtimeError = event.detail;
    console.error(error.name, error.code, error.channel?.length, error.message);
  },
});
realtime.removeEventListener('state', showState);
realtime.connect();
const isThere: boolean = realtime.state === 'connected' && realtime.status.code === undefined;

// Subscriptions.

const kept: Position | null = JSON.parse(localStorage.getItem('news') ?? 'null');

const show: MessageHandler = (message: string | Uint8Array, source: Source) => {
  const text: string = typeof message === 'string' ? message : new TextDecoder().decode(message);
  const sent: Date | undefined = source.time === undefined ? undefined : new Date(source.time);
  console.log(source.replayed ? 'late:' : 'now:', source.channel, text, sent?.toLocaleTimeString());
  const position: Position = { epoch: source.epoch, offset: source.offset };
  localStorage.setItem('news', JSON.stringify(position));
};

const subscribeOptions: SubscribeOptions = {
  since: kept,
  last: 20,
  onSubscribed: ({ recovered, replayed, missed, channel }: Subscribed) => {
    if (missed) {
      location.reload();
    }
    const count: number = recovered === true ? replayed : 0;
    console.log(channel, count);
  },
  onError: (error: RealtimeError) => console.error(error),
};

const unsubscribe: () => void = realtime.subscribe('news', show, subscribeOptions);
const again: () => void = realtime.subscribe('news', message => console.log(message.length));
let last: Source | undefined;
realtime.subscribe('sport', (_, source) => (last = source), { since: last ?? null });
unsubscribe();
again();
realtime.close();
target.dispatchEvent(new Event('state'));
console.log(isThere, new RealtimeError('closed', 'in a test', 'news') instanceof Error);
