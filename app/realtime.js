/**
 * The browser's side of realtimed: subscribe to channels, and have every message that is broadcast on them.
 *
 *     import { Realtime } from './realtime.js';
 *
 *     const realtime = new Realtime('/ws');
 *     const unsubscribe = realtime.subscribe('news', message => console.log(message));
 *
 * It connects by itself, notices when the connection is lost or dead, comes back at a time that is not everyone else's,
 * and subscribes again. An ES module without dependencies, for browsers and, given a WebSocket class, for Node 20.
 *
 * The protocol is `realtime.v1`, section 4 of docs/protocol.md.
 *
 * @module
 */

/**
 * What the connection is doing.
 *
 * - `connecting`: a connection is being made
 * - `connected`: the server has said welcome
 * - `waiting`: there is no connection, and after a while there will be another try
 * - `offline`: the same, while the browser says that it has no network
 * - `closed`: there is no connection and there will be none, until `connect()` is called
 *
 * @typedef {'connecting' | 'connected' | 'waiting' | 'offline' | 'closed'} State
 */

/**
 * @typedef {object} Status
 * @property {State} state
 * @property {string} [client] when connected: this connection's name, as `realtimectl clients` shows it
 * @property {number} [retryIn] when waiting or offline: milliseconds until the next try
 * @property {number} [code] why the last connection ended: the close code, see section 5 of docs/protocol.md
 * @property {string} [reason] the same in words, often empty
 */

/**
 * Where a message comes from.
 *
 * @typedef {object} Source
 * @property {string} channel
 * @property {number} offset numbers the messages of a channel one by one
 */

/** @typedef {(message: string | Uint8Array, source: Source) => void} MessageHandler */

/**
 * The server's word that a subscription holds, for the first time or again after a new connection.
 *
 * @typedef {object} Subscribed
 * @property {string} channel
 * @property {boolean} missed whether messages may have been missed since the subscription held the last time
 */

/**
 * @typedef {object} SubscribeOptions
 * @property {(subscribed: Subscribed) => void} [onSubscribed] each time that the server confirms the subscription
 * @property {(error: RealtimeError) => void} [onError] the server refuses the subscription, which is over then; without
 *     this the error is an `error` event of the `Realtime`
 */

/**
 * What tells the time and runs things later. Times are milliseconds.
 *
 * @typedef {object} Clock
 * @property {() => number} now
 * @property {(callback: () => void, delay: number) => any} setTimeout
 * @property {(timer: any) => void} clearTimeout
 */

/**
 * All times are milliseconds.
 *
 * @typedef {object} Options
 * @property {number} [minDelay] the first try to reconnect comes within this time, which doubles with each try
 * @property {number} [maxDelay] the longest that it grows
 * @property {number} [connectTimeout] how long a connection may take until the server has said welcome
 * @property {number} [answerTimeout] how long a ping may go unanswered until the connection counts as dead
 * @property {number} [rate] subscriptions a second, in the long run; the server's inbound-rate must be higher
 * @property {number} [burst] subscriptions at once; the server's inbound-burst must be more than twice that
 * @property {typeof WebSocket} [WebSocket] the class to connect with
 * @property {Clock} [clock]
 * @property {() => number} [random] a number from 0 up to 1, like Math.random
 * @property {any} [window] whose `online` and `offline` events to heed, and whose `navigator.onLine`
 */

const PROTOCOL = 'realtime.v1';

const DEFAULTS = {
  minDelay: 500,
  maxDelay: 20_000,
  connectTimeout: 15_000,
  answerTimeout: 10_000,
  rate: 40,
  burst: 48,
};

/** A connection that lasted this long was a good one: the tries to reconnect begin anew with the shortest delay. */
const LASTING = 10_000;

/** The longest advice when to come back that is followed. */
const LONGEST_ADVICE = 600_000;

/** The longest silence before a ping, whatever the server calls its heartbeat; proxies cut what is silent for 60 s. */
const LONGEST_SILENCE = 55_000;

const SILENT = 4408;
const SLOW_CONSUMER = 4409;

/** The connection broke without a close code; browsers say so too (RFC 6455 section 7.1.5). */
const ABNORMAL = 1006;

/** @type {Clock} */
const SYSTEM_CLOCK = {
  now: () => performance.now(),
  setTimeout: (callback, delay) => setTimeout(callback, delay),
  clearTimeout: timer => clearTimeout(timer),
};

/** The server's refusal. `code` is one word for programs, such as `invalid_channel`; the message is for people. */
export class RealtimeError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {string} [channel]
   */
  constructor(code, message, channel) {
    super(message);
    this.name = 'RealtimeError';
    this.code = code;
    this.channel = channel;
  }
}

/**
 * A connection to realtimed that renews itself, and the subscriptions it carries.
 *
 * Events:
 *
 * - `state`: the connection's state has changed; `event.detail` is the new {@link Status}
 * - `error`: the server has refused something; `event.detail` is a {@link RealtimeError}. Unless a listener calls
 *   `event.preventDefault()`, it is written to the console.
 */
export class Realtime extends EventTarget {
  #url;
  #settings;

  /** @type {Map<string, Channel>} those with a subscription here, or with one at the server that is being ended */
  #channels = new Map();

  /** @type {Status} */
  #status = { state: 'closed' };

  /** @type {Connection | undefined} set while connecting or connected */
  #connection;

  /** @type {any} set while waiting or offline */
  #retryTimer;
  #retryAt = 0;

  /** Connections that did not last, since the last one that did. */
  #failures = 0;

  /**
   * Connect at once, without waiting for the outcome.
   *
   * @param {string | URL} [url] where WebSockets are served; relative to the page, and `http` means `ws`
   * @param {Options} [options]
   */
  constructor(url = '/ws', options = {}) {
    super();
    this.#url = webSocketUrl(url);
    this.#settings = {
      ...DEFAULTS,
      WebSocket: globalThis.WebSocket,
      clock: SYSTEM_CLOCK,
      random: Math.random,
      window: /** @type {any} */ (globalThis),
      ...options,
    };
    this.connect();
  }

  /** What the connection is doing. */
  get state() {
    return this.#status.state;
  }

  /** The state with all that is known about it. */
  get status() {
    const waiting = this.#retryTimer !== undefined;
    return waiting ? { ...this.#status, retryIn: this.#untilRetry() } : this.#status;
  }

  /**
   * Have `onMessage` called with every message of a channel, from the moment the server has confirmed it.
   *
   * Any number of subscriptions to one channel are one at the server.
   *
   * @param {string} channel
   * @param {MessageHandler} onMessage gets a string, or a Uint8Array if the message is binary
   * @param {SubscribeOptions} [options]
   * @returns {() => void} ends this subscription; a second call does nothing
   */
  subscribe(channel, onMessage, options = {}) {
    if (typeof channel !== 'string' || typeof onMessage !== 'function') {
      throw new TypeError('subscribe() takes the name of a channel and a function');
    }
    const subscription = { onMessage, onSubscribed: options.onSubscribed, onError: options.onError };
    const entry = this.#channels.get(channel) ?? new Channel();
    this.#channels.set(channel, entry);
    entry.subscriptions.add(subscription);
    if (entry.confirmed) {
      queueMicrotask(() => {
        if (entry.subscriptions.has(subscription)) {
          subscription.onSubscribed?.({ channel, missed: false });
        }
      });
    }
    this.#connection?.settle(channel);
    return () => {
      if (entry.subscriptions.delete(subscription) && entry.subscriptions.size === 0) {
        if (this.#connection === undefined) {
          this.#channels.delete(channel);
        }
        this.#connection?.settle(channel);
      }
    };
  }

  /** Connect now: instead of waiting any longer, or again after it was closed. Subscriptions are still there. */
  connect() {
    if (this.#connection === undefined) {
      this.#stopWaiting();
      this.#connection = new Connection(this.#url, this.#settings, {
        isWanted: name => Boolean(this.#channels.get(name)?.subscriptions.size),
        onWelcome: client => this.#welcomed(client),
        onSubscribed: answer => this.#subscribed(answer),
        onUnsubscribed: name => this.#unsubscribed(name),
        onMessage: message => this.#deliver(message),
        onRefused: error => this.#refused(error),
        onLost: ending => this.#lost(ending),
      });
      const { window } = this.#settings;
      window.addEventListener?.('online', this.#online);
      window.addEventListener?.('offline', this.#offline);
      this.#enter({ state: 'connecting' });
    }
  }

  /** Close the connection, and stay away until `connect()` is called. */
  close() {
    if (this.state !== 'closed') {
      this.#connection?.close(1000, '');
      this.#disconnected();
      this.#retire({});
    }
  }

  // What the connection tells.

  /** @param {string} client */
  #welcomed(client) {
    for (const name of this.#channels.keys()) {
      this.#connection?.settle(name);
    }
    this.#enter({ state: 'connected', client });
  }

  /** @param {{channel: string, epoch: string, offset: number, recovered?: boolean}} answer */
  #subscribed({ channel: name, epoch, offset, recovered }) {
    const channel = this.#channels.get(name);
    if (channel === undefined) {
      return;
    }
    const known = channel.position;
    const missed = known !== undefined && recovered !== true && (known.epoch !== epoch || known.offset !== offset);
    // A server that replays begins behind what is known; one that does not begins behind its newest message.
    channel.position = { epoch, offset: recovered === true && known !== undefined ? known.offset : offset };
    channel.confirmed = true;
    for (const subscription of [...channel.subscriptions]) {
      guarded(() => subscription.onSubscribed?.({ channel: name, missed }));
    }
  }

  /** @param {string} name */
  #unsubscribed(name) {
    const channel = this.#channels.get(name);
    if (channel !== undefined) {
      channel.confirmed = false;
      channel.position = undefined;
      if (channel.subscriptions.size === 0) {
        this.#channels.delete(name);
      }
    }
  }

  /** @param {{channel: string, offset: number, data?: string, base64?: string}} message */
  #deliver({ channel: name, offset, data, base64 }) {
    const channel = this.#channels.get(name);
    if (channel === undefined) {
      return;
    }
    if (channel.position !== undefined) {
      channel.position.offset = offset;
    }
    const content = base64 === undefined ? data ?? '' : bytes(base64);
    for (const subscription of [...channel.subscriptions]) {
      guarded(() => subscription.onMessage(content, { channel: name, offset }));
    }
  }

  /** @param {RealtimeError} error */
  #refused(error) {
    if (error.channel === undefined) {
      this.#report(error);
      return;
    }
    const subscriptions = this.#channels.get(error.channel)?.subscriptions ?? new Set();
    this.#channels.delete(error.channel);
    for (const { onError } of [...subscriptions]) {
      guarded(() => (onError === undefined ? this.#report(error) : onError(error)));
    }
    subscriptions.clear();
  }

  /** @param {Ending} ending */
  #lost({ code, reason, lasted, advice }) {
    this.#disconnected();
    if (isFinal(code)) {
      this.#retire({ code, reason });
      return;
    }
    this.#failures = lasted >= LASTING ? 0 : this.#failures;
    const { minDelay, maxDelay, random } = this.#settings;
    const longest = code === SLOW_CONSUMER ? maxDelay : Math.min(maxDelay, minDelay * 2 ** this.#failures);
    this.#failures += 1;
    // The server's advice is different for each client already. Without it, chance keeps clients apart that were lost
    // together: any time up to the longest is as likely as another ("full jitter").
    this.#wait(advice ?? random() * longest, { code, reason });
  }

  // The way back.

  /**
   * @param {number} delay
   * @param {{code?: number, reason?: string}} cause
   */
  #wait(delay, cause) {
    this.#stopWaiting();
    const { clock, window } = this.#settings;
    this.#retryAt = clock.now() + delay;
    this.#retryTimer = clock.setTimeout(() => this.connect(), delay);
    // Being offline is no reason not to try: a server on this very machine is reachable without any network.
    const state = window.navigator?.onLine === false ? 'offline' : 'waiting';
    this.#enter({ state, retryIn: this.#untilRetry(), ...cause });
  }

  #untilRetry() {
    return Math.max(0, this.#retryAt - this.#settings.clock.now());
  }

  #stopWaiting() {
    this.#settings.clock.clearTimeout(this.#retryTimer);
    this.#retryTimer = undefined;
  }

  /** The network is back. Others may have got it back at the same moment, so chance has its part in this as well. */
  #online = () => {
    if (this.#retryTimer !== undefined) {
      const { code, reason } = this.#status;
      this.#failures = 0;
      this.#wait(Math.min(this.#untilRetry(), this.#settings.random() * this.#settings.minDelay), { code, reason });
    }
    this.#connection?.probe();
  };

  #offline = () => {
    if (this.#retryTimer !== undefined) {
      this.#enter({ ...this.#status, state: 'offline', retryIn: this.#untilRetry() });
    }
    this.#connection?.probe();
  };

  #disconnected() {
    this.#connection = undefined;
    for (const [name, channel] of this.#channels) {
      channel.confirmed = false;
      if (channel.subscriptions.size === 0) {
        this.#channels.delete(name);
      }
    }
  }

  /** @param {{code?: number, reason?: string}} cause */
  #retire(cause) {
    this.#stopWaiting();
    this.#failures = 0;
    this.#settings.window.removeEventListener?.('online', this.#online);
    this.#settings.window.removeEventListener?.('offline', this.#offline);
    this.#enter({ state: 'closed', ...cause });
  }

  /** @param {Status} status */
  #enter(status) {
    this.#status = status;
    this.dispatchEvent(new CustomEvent('state', { detail: status }));
  }

  /** @param {RealtimeError} error */
  #report(error) {
    if (this.dispatchEvent(new CustomEvent('error', { detail: error, cancelable: true }))) {
      console.error(error);
    }
  }
}

/** What is known of one channel, over all connections. */
class Channel {
  /** Whether the server has confirmed the subscription, on the connection there is now. */
  confirmed = false;

  /**
   * The newest message there was; undefined before the first subscription is confirmed.
   *
   * @type {{epoch: string, offset: number} | undefined}
   */
  position;

  /** @type {Set<{onMessage: MessageHandler} & SubscribeOptions>} */
  subscriptions = new Set();
}

/**
 * How a connection ended.
 *
 * @typedef {object} Ending
 * @property {number} code
 * @property {string} reason
 * @property {number} lasted milliseconds since the server's welcome, or 0 without one
 * @property {number} [advice] in how many milliseconds to come back, if the server said so
 */

/**
 * @typedef {object} ConnectionHandlers
 * @property {(name: string) => boolean} isWanted
 * @property {(client: string) => void} onWelcome
 * @property {(answer: any) => void} onSubscribed
 * @property {(name: string) => void} onUnsubscribed
 * @property {(message: any) => void} onMessage
 * @property {(error: RealtimeError) => void} onRefused
 * @property {(ending: Ending) => void} onLost called once, and nothing after it
 */

/**
 * One WebSocket, from its opening to its end. Knows the protocol, keeps to the server's limits, and notices silence.
 *
 * The limits: whoever sends too much too fast is disconnected, and after a reconnection everything is subscribed again
 * at once. So requests are paced, and there may be only so many unanswered ones: what is on its way may be held up and
 * arrive in one go. Of any span of t seconds the server thus sees at most 2 × burst + rate × t requests.
 */
class Connection {
  #settings;
  #handlers;
  #socket;
  #pace;

  /** Channels whose subscription may not be what is wanted. @type {Set<string>} */
  #unsettled = new Set();

  /** Channels that the server has been asked to subscribe, and not to unsubscribe since. @type {Set<string>} */
  #asked = new Set();

  /** Requests without an answer yet, by id. @type {Map<number, {action: string, channel: string}>} */
  #requests = new Map();
  #nextId = 1;

  /** Runs while there are unsettled channels that must wait for their turn. @type {any} */
  #paceTimer;

  /** Runs until the welcome must have come; after it, until it is time to look whether anything was heard. @type {any} */
  #silenceTimer;
  #heartbeat = LONGEST_SILENCE;
  #heardAt = 0;

  /** Whether a ping has been sent, and nothing was heard since. */
  #pinged = false;

  /** @type {number | undefined} */
  #welcomedAt;

  /** @type {number | undefined} */
  #advice;

  /**
   * @param {URL} url
   * @param {typeof DEFAULTS & {WebSocket: typeof WebSocket, clock: Clock}} settings
   * @param {ConnectionHandlers} handlers
   */
  constructor(url, settings, handlers) {
    if (settings.WebSocket === undefined) {
      throw new TypeError('there is no WebSocket class here: pass one as the option WebSocket');
    }
    this.#settings = settings;
    this.#handlers = handlers;
    this.#pace = new Pace(settings.rate, settings.burst, settings.clock);
    this.#socket = new settings.WebSocket(url.href, [PROTOCOL]);
    this.#socket.onmessage = event => this.#receive(event.data);
    this.#socket.onclose = event => this.#end(event.code, event.reason);
    this.#silenceTimer = settings.clock.setTimeout(
      () => this.#abandon(ABNORMAL, 'the server did not say welcome in time'),
      settings.connectTimeout,
    );
  }

  /**
   * See to it that the channel is subscribed at the server if it is wanted, and not if not.
   *
   * @param {string} channel
   */
  settle(channel) {
    this.#unsettled.add(channel);
    if (this.#paceTimer === undefined) {
      this.#sendRequests();
    }
  }

  /** Find out soon whether the connection still works. */
  probe() {
    if (this.#welcomedAt !== undefined && !this.#pinged) {
      this.#ping();
    }
  }

  /**
   * Close the connection without telling the handlers.
   *
   * @param {number} code
   * @param {string} reason
   */
  close(code, reason) {
    this.#settings.clock.clearTimeout(this.#silenceTimer);
    this.#settings.clock.clearTimeout(this.#paceTimer);
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close(code, reason);
  }

  /** @param {string} text */
  #receive(text) {
    this.#heardAt = this.#settings.clock.now();
    this.#pinged = false;
    const message = JSON.parse(text);
    switch (message.event) {
      case 'welcome':
        this.#welcomedAt = this.#heardAt;
        this.#heartbeat = Math.min(message.heartbeat * 1000 || LONGEST_SILENCE, LONGEST_SILENCE);
        this.#lookAgainIn(this.#heartbeat);
        this.#handlers.onWelcome(message.client);
        break;
      case 'message':
        this.#handlers.onMessage(message);
        break;
      case 'subscribed':
        this.#answered(message.id);
        this.#handlers.onSubscribed(message);
        break;
      case 'unsubscribed':
        this.#answered(message.id);
        this.#handlers.onUnsubscribed(message.channel);
        break;
      case 'error': {
        const request = this.#answered(message.id);
        const refused = request?.action === 'subscribe' ? request.channel : undefined;
        if (refused !== undefined) {
          this.#asked.delete(refused);
        }
        this.#handlers.onRefused(new RealtimeError(message.code, message.message, refused));
        break;
      }
      case 'goodbye':
        this.#advice = message.retry_after_ms;
        break;
      // A pong has said all it has to say by arriving. Later versions may say more than is known here.
    }
  }

  /** @param {number} id */
  #answered(id) {
    const request = this.#requests.get(id);
    this.#requests.delete(id);
    if (this.#paceTimer === undefined) {
      this.#sendRequests();
    }
    return request;
  }

  /** Send what the limits allow; the rest when the pace allows it or an answer comes. */
  #sendRequests() {
    if (this.#welcomedAt === undefined || this.#socket.readyState !== this.#settings.WebSocket.OPEN) {
      return;
    }
    for (const channel of this.#unsettled) {
      const wanted = this.#handlers.isWanted(channel);
      if (wanted !== this.#asked.has(channel)) {
        if (this.#requests.size >= this.#settings.burst) {
          return;
        }
        const delay = this.#pace.take();
        if (delay > 0) {
          this.#paceTimer = this.#settings.clock.setTimeout(() => {
            this.#paceTimer = undefined;
            this.#sendRequests();
          }, delay);
          return;
        }
        this.#request(wanted ? 'subscribe' : 'unsubscribe', channel);
      } else if (!wanted) {
        this.#handlers.onUnsubscribed(channel); // it was over before the server heard of it
      }
      this.#unsettled.delete(channel);
    }
  }

  /**
   * @param {'subscribe' | 'unsubscribe'} action
   * @param {string} channel
   */
  #request(action, channel) {
    const id = this.#nextId++;
    this.#requests.set(id, { action, channel });
    if (action === 'subscribe') {
      this.#asked.add(channel);
    } else {
      this.#asked.delete(channel);
    }
    this.#socket.send(JSON.stringify({ action, channel, id }));
  }

  /** @param {number} delay */
  #lookAgainIn(delay) {
    this.#settings.clock.clearTimeout(this.#silenceTimer);
    this.#silenceTimer = this.#settings.clock.setTimeout(() => this.#lookForSilence(), delay);
  }

  /** Timers may be very late, in tabs in the background and after a sleep: only an unanswered ping proves anything. */
  #lookForSilence() {
    const silence = this.#settings.clock.now() - this.#heardAt;
    if (this.#pinged) {
      this.#abandon(SILENT, 'nothing heard from you');
    } else if (silence >= this.#heartbeat) {
      this.#ping();
    } else {
      this.#lookAgainIn(this.#heartbeat - silence);
    }
  }

  #ping() {
    this.#pinged = true;
    this.#lookAgainIn(this.#settings.answerTimeout);
    if (this.#socket.readyState === this.#settings.WebSocket.OPEN) {
      this.#socket.send('{"action":"ping"}');
    }
  }

  /**
   * Give up on a connection that may be dead: its own end might take minutes to be noticed.
   *
   * @param {number} code
   * @param {string} reason
   */
  #abandon(code, reason) {
    this.close(code === ABNORMAL ? 1000 : code, code === ABNORMAL ? '' : reason);
    this.#end(code, reason);
  }

  /**
   * @param {number} code
   * @param {string} reason
   */
  #end(code, reason) {
    const { clock } = this.#settings;
    clock.clearTimeout(this.#silenceTimer);
    clock.clearTimeout(this.#paceTimer);
    const lasted = this.#welcomedAt === undefined ? 0 : clock.now() - this.#welcomedAt;
    const said = this.#advice ?? Number(/come back in (\d+) ms/.exec(reason)?.[1] ?? NaN);
    const advice = said >= 0 ? Math.min(said, LONGEST_ADVICE) : undefined;
    this.#handlers.onLost({ code, reason, lasted, advice });
  }
}

/** So many at once, and so many a second in the long run: a token bucket. */
class Pace {
  #tokens;
  #countedAt;

  /**
   * @param {number} rate
   * @param {number} burst
   * @param {Clock} clock
   */
  constructor(rate, burst, clock) {
    this.rate = rate;
    this.burst = burst;
    this.clock = clock;
    this.#tokens = burst;
    this.#countedAt = clock.now();
  }

  /** Take one, if there is one, and return 0; or return in how many milliseconds there will be one. */
  take() {
    const now = this.clock.now();
    this.#tokens = Math.min(this.burst, this.#tokens + ((now - this.#countedAt) * this.rate) / 1000);
    this.#countedAt = now;
    if (this.#tokens >= 1) {
      this.#tokens -= 1;
      return 0;
    }
    return Math.ceil(((1 - this.#tokens) * 1000) / this.rate);
  }
}

/**
 * Whether a close code means: do not come back unchanged. Section 5 of docs/protocol.md.
 *
 * @param {number} code
 */
function isFinal(code) {
  return [1002, 1007, 1009].includes(code) || (code >= 4400 && code < 4500 && code !== SILENT && code !== SLOW_CONSUMER);
}

/** @param {string | URL} url */
function webSocketUrl(url) {
  const absolute = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href);
  absolute.protocol = absolute.protocol.replace(/^http/, 'ws');
  absolute.hash = ''; // the WebSocket constructor refuses fragments
  return absolute;
}

/** @param {string} base64 */
function bytes(base64) {
  return Uint8Array.from(atob(base64), character => character.charCodeAt(0));
}

/**
 * Call a handler of the page's. If it throws, the error is reported like any other that nobody catches, and neither
 * keeps the next handler from its message nor harms the connection.
 *
 * @param {() => void} call
 */
function guarded(call) {
  try {
    call();
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}
