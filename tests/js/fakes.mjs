/** What a Realtime lives on, under the control of a test: time, chance, network and WebSockets. */

import { Realtime } from '../../app/realtime.js';

/** Time that passes only when a test says so. */
export class FakeClock {
  #timers = new Map();
  #nextTimer = 1;
  #time = 0;

  now = () => this.#time;

  setTimeout = (callback, delay) => {
    this.#timers.set(this.#nextTimer, { at: this.#time + delay, callback });
    return this.#nextTimer++;
  };

  clearTimeout = timer => {
    this.#timers.delete(timer);
  };

  get timers() {
    return this.#timers.size;
  }

  /** Let time pass; whatever is due happens in order. */
  pass(milliseconds) {
    const end = this.#time + milliseconds;
    for (;;) {
      const [timer, due] = [...this.#timers].sort(([, a], [, b]) => a.at - b.at)[0] ?? [];
      if (due === undefined || due.at > end) {
        break;
      }
      this.#timers.delete(timer);
      this.#time = Math.max(this.#time, due.at);
      due.callback();
    }
    this.#time = end;
  }

  /** Let time pass in which no timer runs, as in a computer that sleeps; what was due runs late. */
  sleep(milliseconds) {
    this.#time += milliseconds;
  }
}

/** A browser's WebSocket, of which the test plays the server's side. */
export class FakeWebSocket {
  static CONNECTING = 0;
  static OPEN = 1;
  static CLOSING = 2;
  static CLOSED = 3;

  readyState = FakeWebSocket.CONNECTING;
  onmessage = null;
  onclose = null;
  onerror = null;
  sent = [];
  closedWith = undefined;

  constructor(url, protocols) {
    this.url = url;
    this.protocols = protocols;
  }

  send(text) {
    if (this.readyState !== FakeWebSocket.OPEN) {
      throw new Error('a browser would throw here, or drop this');
    }
    this.sent.push(JSON.parse(text));
  }

  close(code, reason) {
    this.readyState = FakeWebSocket.CLOSING;
    this.closedWith = { code, reason };
  }

  // The server's side.

  say(event, fields = {}) {
    this.onmessage?.({ data: JSON.stringify({ event, ...fields }) });
  }

  welcome(fields = {}) {
    this.readyState = FakeWebSocket.OPEN;
    this.say('welcome', { client: 'c-1', heartbeat: 25, ...fields });
  }

  /** Confirm every subscription and unsubscription that was not answered yet. */
  answer(fields = {}) {
    const requests = this.sent.filter(request => request.id > this.answered);
    for (const { action, channel, id } of requests) {
      this.answered = id;
      this.say(`${action}d`, { channel, id, ...(action === 'subscribe' ? { epoch: 'e1', offset: 0, ...fields } : {}) });
    }
  }

  answered = 0;

  hangUp(code = 1006, reason = '') {
    this.readyState = FakeWebSocket.CLOSED;
    this.onclose?.({ code, reason });
  }

  /** As in Node 22, where no close follows. */
  fail() {
    this.onerror?.({ type: 'error' });
  }

  get requests() {
    return this.sent.filter(({ action }) => action !== 'ping').map(({ action, channel }) => `${action} ${channel}`);
  }

  get pings() {
    return this.sent.filter(({ action }) => action === 'ping').length;
  }
}

/** A Realtime with all its surroundings faked. */
export class World {
  clock = new FakeClock();
  network = Object.assign(new EventTarget(), {
    navigator: { onLine: true },
    document: Object.assign(new EventTarget(), { visibilityState: 'visible' }),
  });
  sockets = [];
  states = [];
  errors = [];
  chance = 1;

  constructor(options = {}) {
    const { sockets } = this;
    class RecordedWebSocket extends FakeWebSocket {
      constructor(url, protocols) {
        super(url, protocols);
        sockets.push(this);
      }
    }
    this.realtime = new Realtime('ws://localhost/ws', {
      WebSocket: RecordedWebSocket,
      clock: this.clock,
      random: () => this.chance,
      window: this.network,
      ...options,
    });
    this.realtime.addEventListener('state', event => this.states.push(event.detail.state));
    this.realtime.addEventListener('error', event => {
      event.preventDefault();
      this.errors.push(event.detail);
    });
  }

  /** The newest connection. */
  get socket() {
    return this.sockets.at(-1);
  }

  /** Let a message of `news` arrive that is its own offset. */
  say(offset) {
    this.socket.say('message', { channel: 'news', offset, data: offset });
  }

  goOnline(online) {
    this.network.navigator.onLine = online;
    this.network.dispatchEvent(new Event(online ? 'online' : 'offline'));
  }

  /** The browser lets the page into its cache of pages, if it may, or takes it out again. */
  turnPage(type, { persisted }) {
    this.network.dispatchEvent(Object.assign(new Event(type), { persisted }));
  }

  /** @param {'visible' | 'hidden'} visibility */
  show(visibility) {
    this.network.document.visibilityState = visibility;
    this.network.document.dispatchEvent(new Event('visibilitychange'));
  }

  /** Subscribe, and return the array that the messages end up in. */
  watch(channel, options) {
    const messages = [];
    messages.stop = this.realtime.subscribe(channel, message => messages.push(message), options);
    return messages;
  }
}
