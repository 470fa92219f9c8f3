/**
 * The browser's side of realtimed: subscribe to channels, and get every message that is broadcast on them.
 *
 *     import { Realtime } from './realtime.js';
 *
 *     const realtime = new Realtime('/ws');
 *     const unsubscribe = realtime.subscribe('news', message => console.log(message));
 *
 * It connects by itself and notices when the connection is lost or dead. Then it reconnects by itself, after a random
 * delay or the one the server asked for, subscribes again from its last position, and delivers what was missed: each
 * message once, in order. When the server's history does not reach back that far, it says so. An ES module without
 * dependencies, for browsers and for Node 22; for Node 18 and 20 when given a WebSocket class, such as that of the
 * package `ws`.
 *
 * The protocol is `realtime.v1`, section 4 of docs/protocol.md.
 *
 * @module
 */

/**
 * What the connection is doing.
 *
 * - `connecting`: a connection is being made
 * - `connected`: the server has sent its welcome
 * - `waiting`: there is no connection, and after a while there is another try
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
 * A place in a channel's stream of messages.
 *
 * @typedef {object} Position
 * @property {string} epoch offsets mean something only within one epoch
 * @property {number} offset numbers the messages of a channel one by one
 */

/**
 * The place of a message. It can be kept and passed as `since`.
 *
 * @typedef {object} Source
 * @property {string} channel
 * @property {string} epoch
 * @property {number} offset
 * @property {boolean} replayed whether it was published before the server confirmed this subscription: while this
 *     client was away, or before it first connected
 * @property {number} [time] when it was published, in milliseconds since 1970 by the server's clock, like `Date.now()`;
 *     absent if the server does not send it
 */

/** @typedef {(message: string | Uint8Array, source: Source) => void} MessageHandler */

/**
 * The server's confirmation of a subscription, for the first time or again after a new connection.
 *
 * @typedef {object} Subscribed
 * @property {string} channel
 * @property {boolean} [recovered] when there was a position to continue from: true if every message since then is here
 *     or follows; false if messages are missing, because the server's history does not reach back that far
 * @property {number} replayed how many missed messages follow now; those that `last` asked for are not counted
 * @property {boolean} missed whether messages are missing: `recovered === false`
 */

/**
 * @typedef {object} SubscribeOptions
 * @property {(subscribed: Subscribed) => void} [onSubscribed] called each time the server confirms the subscription
 * @property {(error: RealtimeError) => void} [onError] called when the server refuses the subscription, which is then
 *     over; without it the error becomes an `error` event of the `Realtime`
 * @property {Position | null} [since] deliver first what was published after this: the position of the last message
 *     that the page has, kept over a reload for instance. Other subscriptions to the channel get none of it again.
 * @property {number | null} [last] deliver first the newest messages that the server keeps, at most this many; no
 *     effect beside `since`, nor with a server that does not know `last`. After a reconnection the subscription
 *     continues from the last message it had.
 */

/**
 * A clock with timers. Times are milliseconds.
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
 * @property {number} [maxDelay] the limit of that time
 * @property {number} [connectTimeout] how long a connection may take until the server's welcome
 * @property {number} [answerTimeout] how long a ping may go unanswered before the connection counts as dead
 * @property {number} [rate] subscriptions a second, in the long run; the server's inbound-rate must be higher
 * @property {number} [burst] subscriptions at once; the server's inbound-burst must be more than twice that
 * @property {typeof WebSocket} [WebSocket] the class to connect with
 * @property {Clock} [clock]
 * @property {() => number} [random] a number from 0 up to 1, like Math.random
 * @property {any} [window] the source of events (`online`, `pageshow` and the like, and those of its `document`) and of
 *     `navigator.onLine`
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

/** A connection that lasted this long was a good one: the next try to reconnect comes after the shortest delay. */
const LASTING = 10_000;

/** The longest time to come back after that is accepted from the server. */
const LONGEST_ADVICE = 600_000;

/** The longest silence before a ping, whatever the server's heartbeat; proxies cut connections silent for 60 s. */
const LONGEST_SILENCE = 55_000;

/** The close that belongs to an error comes within this time, if one comes. */
const CLOSE_FOLLOWS = 100;

/** A timer later than this was held up because the page was frozen, or the computer asleep. */
const LATE = 2_000;

/**
 * The events of a {@link Realtime}, by type.
 *
 * @typedef {object} RealtimeEvents
 * @property {DetailedEvent<Status>} state
 * @property {DetailedEvent<Subscribed>} subscribed
 * @property {DetailedEvent<RealtimeError>} error
 */

const SILENT = 4408;
const SLOW_CONSUMER = 4409;

/** Close codes after which coming back unchanged would end the same way; section 5 of docs/protocol.md. */
const FINAL = new Map([
  [1002, 'this client broke the WebSocket protocol'],
  [1007, 'this client sent text that is not UTF-8'],
  [1009, 'this client sent a message that is too big'],
  [4400, 'this client sent what the server does not understand'],
  [4403, 'this client is not allowed here'],
  [4404, 'there are no WebSockets at this address'],
  [4429, 'this client sent too much, or wanted too many channels'],
]);

/** The connection broke without a close code; browsers report the same (RFC 6455 section 7.1.5). */
const ABNORMAL = 1006;

/** @type {Clock} */
const SYSTEM_CLOCK = {
  now: () => performance.now(),
  setTimeout: (callback, delay) => setTimeout(callback, delay),
  clearTimeout: timer => clearTimeout(timer),
};

/**
 * The server's refusal. `code` is one word for programs, such as `invalid_channel`, or `closed` when the connection was
 * closed for good; the message is for people.
 */
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
 * An event with a detail; Node has CustomEvent only since version 19.
 *
 * @template T
 */
class DetailedEvent extends Event {
  /**
   * @param {string} type
   * @param {T} detail
   * @param {EventInit} [init]
   */
  constructor(type, detail, init) {
    super(type, init);
    this.detail = detail;
  }
}

/**
 * A connection to realtimed that renews itself, and the subscriptions it carries.
 *
 * Events:
 *
 * - `state`: the connection's state has changed; `event.detail` is the new {@link Status}
 * - `subscribed`: the server has confirmed one or more subscriptions to a channel; `event.detail` is the
 *   {@link Subscribed} that `onSubscribed` of the first of them got
 * - `error`: the server has refused something, or has closed the connection for good; `event.detail` is a
 *   {@link RealtimeError}. Unless a listener calls `event.preventDefault()`, it is written to the console.
 */
export class Realtime extends EventTarget {
  #url;
  #settings;

  /** @type {Map<string, Channel>} those with a subscription here, or with one at the server that is about to end */
  #channels = new Map();

  /** @type {Status} */
  #status = { state: 'closed' };

  /** @type {Connection | undefined} set while connecting or connected */
  #connection;

  /** @type {any} set while waiting or offline */
  #retryTimer;
  #retryAt = 0;

  /** Whether the server said when to come back: then nothing shortens the wait. */
  #advised = false;

  /** How many connections did not last, since the last one that did. */
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

  /** The connection's state, with its details. */
  get status() {
    const waiting = this.#retryTimer !== undefined;
    return waiting ? { ...this.#status, retryIn: this.#untilRetry() } : this.#status;
  }

  /**
   * Call `onMessage` with every message of a channel, once and in order, from the moment the server has confirmed the
   * subscription. Messages published while the connection is down come when it is back; see {@link Subscribed}.
   *
   * All subscriptions to one channel are one at the server; each has its own position. One that joins others while the
   * connection is down also gets what is published until it is back.
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
    const subscription = new Subscription(onMessage, options);
    const entry = this.#channels.get(channel) ?? new Channel(channel);
    this.#channels.set(channel, entry);
    if (entry.join(subscription)) {
      const recovered = options.since ? { recovered: true } : {};
      queueMicrotask(() => {
        if (entry.subscriptions.has(subscription) && subscription.isLive) {
          subscription.onSubscribed?.({ channel, replayed: 0, missed: false, ...recovered });
        }
      });
    }
    this.#connection?.settle(entry);
    return () => {
      if (entry.leave(subscription)) {
        this.#connection?.settle(entry);
        this.#forgetIfIdle(entry);
      }
    };
  }

  /**
   * As in every EventTarget, with the types of these events.
   *
   * @template {keyof RealtimeEvents} Type
   * @param {Type} type
   * @param {((event: RealtimeEvents[Type]) => void) | {handleEvent(event: RealtimeEvents[Type]): void} | null} listener
   * @param {boolean | AddEventListenerOptions} [options]
   */
  addEventListener(type, listener, options) {
    super.addEventListener(type, /** @type {EventListener} */ (listener), options);
  }

  /**
   * As in every EventTarget, with the types of these events.
   *
   * @template {keyof RealtimeEvents} Type
   * @param {Type} type
   * @param {((event: RealtimeEvents[Type]) => void) | {handleEvent(event: RealtimeEvents[Type]): void} | null} listener
   * @param {boolean | EventListenerOptions} [options]
   */
  removeEventListener(type, listener, options) {
    super.removeEventListener(type, /** @type {EventListener} */ (listener), options);
  }

  /** Connect now: instead of waiting any longer, or again after `close()`. Subscriptions are kept. */
  connect() {
    if (this.#connection === undefined) {
      this.#stopWaiting();
      this.#connection = new Connection(this.#url, this.#settings, {
        onWelcome: client => this.#welcomed(client),
        onSubscribed: (request, answer) => this.#subscribed(request, answer),
        onUnsubscribed: request => this.#unsubscribed(request),
        onMessage: message => this.#deliver(message),
        onRefused: (request, error) => this.#refused(request, error),
        onLost: ending => this.#lost(ending),
      });
      for (const [target, type, listener] of this.#surroundings) {
        target?.addEventListener?.(type, listener);
      }
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

  // What the connection reports.

  /** @param {string} client */
  #welcomed(client) {
    for (const channel of this.#channels.values()) {
      this.#connection?.settle(channel);
    }
    this.#enter({ state: 'connected', client });
  }

  /**
   * @param {ChannelRequest} request
   * @param {Position & {recovered?: boolean}} answer
   */
  #subscribed(request, answer) {
    const { channel } = request;
    const heard = channel.confirm(request, answer, this.#connection?.answers ?? 0);
    for (const [subscription, subscribed] of heard) {
      if (channel.subscriptions.has(subscription)) {
        guarded(() => subscription.onSubscribed?.({ ...subscribed }));
      }
    }
    if (heard.length > 0) {
      this.dispatchEvent(new DetailedEvent('subscribed', heard[0][1]));
    }
  }

  /** @param {ChannelRequest} request */
  #unsubscribed({ channel }) {
    channel.end();
    this.#forgetIfIdle(channel);
  }

  /** @param {{channel: string, offset: number, time?: number, data?: string, base64?: string}} message */
  #deliver({ channel: name, offset, time, data, base64 }) {
    const channel = this.#channels.get(name);
    const position = channel?.advance(offset);
    if (channel === undefined || position === undefined) {
      return; // no subscription has asked for it
    }
    /** @type {string | Uint8Array | undefined} */
    let content;
    for (const subscription of [...channel.subscriptions]) {
      // A handler may end other subscriptions, or close the connection: those that miss this get it afterwards.
      if (channel.subscriptions.has(subscription) && subscription.take(offset)) {
        content ??= base64 === undefined ? data ?? '' : bytes(base64);
        const replayed = offset <= subscription.replayedUpTo;
        /** @type {Source} */
        const source = { channel: name, epoch: position.epoch, offset, replayed };
        if (typeof time === 'number') {
          source.time = time;
        }
        const message = content;
        guarded(() => subscription.onMessage(message, source));
      }
    }
  }

  /**
   * @param {ChannelRequest | undefined} request what is refused, if the server says so
   * @param {RealtimeError} error
   */
  #refused(request, error) {
    const refused = request?.channel.refuse(request) ?? [];
    if (request?.action !== 'subscribe') {
      this.#report(error);
      return;
    }
    this.#forgetIfIdle(request.channel);
    for (const { onError } of refused) {
      guarded(() => (onError === undefined ? this.#report(error) : onError(error)));
    }
  }

  /** @param {{code: number, reason: string, lasted: number, advice?: number}} ending see {@link Connection} */
  #lost({ code, reason, lasted, advice }) {
    this.#disconnected();
    const cause = finalCause(code);
    if (cause !== undefined) {
      this.#retire({ code, reason });
      const words = `The server has closed the connection, and coming back would not help: ${cause}`;
      this.#report(new RealtimeError('closed', `${words} (${code}${reason && `, ${reason}`})`));
      return;
    }
    this.#failures = lasted >= LASTING ? 0 : this.#failures;
    const { minDelay, maxDelay, random } = this.#settings;
    const longest = code === SLOW_CONSUMER ? maxDelay : Math.min(maxDelay, minDelay * 2 ** this.#failures);
    this.#failures += 1;
    // The server's advice already differs for each client. Without it, chance keeps clients apart that were
    // disconnected together: every time up to the longest is equally likely ("full jitter").
    this.#wait(advice ?? random() * longest, { code, reason }, advice !== undefined);
  }

  // The way back.

  /**
   * @param {number} delay
   * @param {{code?: number, reason?: string}} cause
   * @param {boolean} advised
   */
  #wait(delay, cause, advised) {
    this.#stopWaiting();
    const { clock, window } = this.#settings;
    this.#advised = advised;
    this.#retryAt = clock.now() + delay;
    this.#retryTimer = clock.setTimeout(() => this.connect(), delay);
    // Try even when offline: a server on this machine is reachable without any network.
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

  /** Shorten the wait to that of a first try. Others may do so at the same moment, so this wait is random too. */
  #hurry() {
    if (this.#retryTimer !== undefined) {
      const { code, reason } = this.#status;
      const soon = this.#advised ? Infinity : this.#settings.random() * this.#settings.minDelay;
      this.#wait(Math.min(this.#untilRetry(), soon), { code, reason }, this.#advised);
    }
    this.#connection?.probe();
  }

  // The browser's events. A browser may be wrong, so they change when to try, never whether.

  #online = () => {
    this.#failures = 0;
    this.#hurry();
  };

  #offline = () => {
    if (this.#retryTimer !== undefined) {
      this.#enter({ ...this.#status, state: 'offline', retryIn: this.#untilRetry() });
    }
    this.#connection?.probe();
  };

  /** The page is visible again. It may have been frozen: timers late, the connection long dead. */
  #awake = () => {
    if (this.#settings.window.document?.visibilityState !== 'hidden') {
      this.#hurry();
    }
  };

  /**
   * The browser may cache the page for its Back button. No browser keeps the WebSocket, and some do not cache a page
   * that has one open. If the page lives on, so does the timer.
   *
   * @param {{persisted: boolean}} event
   */
  #leaving = ({ persisted }) => {
    if (persisted && this.#connection !== undefined) {
      this.#connection.close(1000, '');
      this.#disconnected();
      this.#wait(this.#settings.random() * this.#settings.minDelay, {}, false);
    }
  };

  /** @param {{persisted: boolean}} event */
  #returned = ({ persisted }) => {
    if (persisted) {
      this.#hurry();
    }
  };

  /** The events to listen for unless the connection is closed. @returns {[any, string, (event: any) => void][]} */
  get #surroundings() {
    const { window } = this.#settings;
    return [
      [window, 'online', this.#online],
      [window, 'offline', this.#offline],
      [window, 'pagehide', this.#leaving],
      [window, 'pageshow', this.#returned],
      [window.document, 'visibilitychange', this.#awake],
      [window.document, 'resume', this.#awake],
    ];
  }

  #disconnected() {
    const answers = this.#connection?.answers ?? 0;
    this.#connection = undefined;
    for (const channel of this.#channels.values()) {
      channel.disconnect(answers);
      this.#forgetIfIdle(channel);
    }
  }

  /** @param {Channel} channel */
  #forgetIfIdle(channel) {
    if (channel.isIdle && this.#channels.get(channel.name) === channel) {
      this.#channels.delete(channel.name);
    }
  }

  /** @param {{code?: number, reason?: string}} cause */
  #retire(cause) {
    this.#stopWaiting();
    this.#failures = 0;
    for (const [target, type, listener] of this.#surroundings) {
      target?.removeEventListener?.(type, listener);
    }
    this.#enter({ state: 'closed', ...cause });
  }

  /** @param {Status} status */
  #enter(status) {
    this.#status = status;
    this.dispatchEvent(new DetailedEvent('state', status));
  }

  /** @param {RealtimeError} error */
  #report(error) {
    if (this.dispatchEvent(new DetailedEvent('error', error, { cancelable: true }))) {
      console.error(error);
    }
  }
}

/**
 * A request to the server for one channel. The server answers requests in the order in which they were sent. An answer
 * applies only to the subscriptions that asked for it: one that joins after an unsubscription was sent must not take
 * the answer to an earlier request for its own.
 */
class ChannelRequest {
  /** Those that get the answer. @type {Set<Subscription>} */
  subscriptions = new Set();

  /**
   * @param {'subscribe' | 'unsubscribe'} action
   * @param {Channel} channel
   * @param {{since?: Position, last?: number}} [start]
   */
  constructor(action, channel, { since, last } = {}) {
    this.action = action;
    this.channel = channel;
    this.since = since;
    this.last = last;
  }
}

/**
 * One call of `subscribe()`: a handler and its position.
 */
class Subscription {
  /** The last message that was delivered, or the position to continue from. @type {Position | undefined} */
  position;

  /** How many of the newest messages to begin with, until the server has confirmed. @type {number | undefined} */
  last;

  /** Whether it takes incoming messages: they continue from its position. */
  isLive = false;

  /** The newest message when the server confirmed the subscription: everything up to it is replayed. */
  replayedUpTo = 0;

  /**
   * How many answers the connection had brought when this was confirmed with `last`; undefined otherwise, and after the
   * first message. The server answers nothing else before a replay is complete, so a later answer shows that it is.
   *
   * @type {number | undefined}
   */
  #confirmedAt;

  /**
   * @param {MessageHandler} onMessage
   * @param {SubscribeOptions} options
   */
  constructor(onMessage, { onSubscribed, onError, since, last }) {
    if (since !== undefined && since !== null) {
      if (typeof since.epoch !== 'string' || !isCount(since.offset)) {
        throw new TypeError('since is a position: an object with an epoch, a string, and an offset, a whole number from 0');
      }
      this.position = { epoch: since.epoch, offset: since.offset };
    } else if (last !== undefined && last !== null) {
      if (!isCount(last)) {
        throw new TypeError('last is a number of messages: a whole number from 0');
      }
      this.last = last;
    }
    this.onMessage = onMessage;
    this.onSubscribed = onSubscribed;
    this.onError = onError;
  }

  /**
   * Whether both get the same from the same request.
   *
   * @param {{since?: Position, last?: number}} request
   */
  startsLike({ since, last }) {
    return isSame(this.position, since) && this.last === last;
  }

  /**
   * The server has confirmed the subscription.
   *
   * @param {string} channel
   * @param {Position & {recovered?: boolean}} answer
   * @param {number} answers how many there were on this connection, with this one
   * @returns {Subscribed}
   */
  confirm(channel, { epoch, offset, recovered }, answers) {
    const known = this.position;
    this.isLive = true;
    this.replayedUpTo = offset;
    if (known?.epoch === epoch && (recovered === true ? known.offset <= offset : known.offset === offset)) {
      // The position stays: the messages that follow begin after it, not after the newest.
      return { channel, recovered: true, replayed: offset - known.offset, missed: false };
    }
    if (this.last !== undefined) {
      // The replay may begin later, if fewer were kept. Its first message shows where.
      this.position = { epoch, offset: Math.max(0, offset - this.last) };
      this.#confirmedAt = answers;
      this.last = undefined;
    } else {
      this.position = { epoch, offset };
    }
    const missed = known !== undefined;
    return { channel, ...(missed && { recovered: false }), replayed: 0, missed };
  }

  /**
   * Take the message with this offset, unless it is not meant for this subscription.
   *
   * @param {number} offset
   */
  take(offset) {
    const isNew = this.isLive && this.position !== undefined && offset > this.position.offset;
    if (isNew && this.position !== undefined) {
      this.position.offset = offset;
      this.#confirmedAt = undefined;
    }
    return isNew;
  }

  /**
   * The connection is gone.
   *
   * @param {number} answers how many it has brought
   */
  disconnect(answers) {
    this.isLive = false;
    if (this.#confirmedAt !== undefined && this.position !== undefined && answers > this.#confirmedAt) {
      this.position.offset = this.replayedUpTo; // there was nothing to replay
    }
    this.#confirmedAt = undefined;
  }
}

/**
 * One channel: its subscriptions over all connections, and the requests and answers of this connection.
 *
 * At the server there is one subscription or none. `isStreaming` is its last answer; `requests` are those without an
 * answer yet; together they give the state to come (`isAsked`). A subscription here is in one of these places:
 *
 * - `#waiting`: it needs a request that has not been sent
 * - in the `subscriptions` of one of `requests`: its request has been sent
 * - neither: the server has confirmed it
 *
 * Confirmed subscriptions get messages, and so do those that began at the position of the stream while it flows.
 */
class Channel {
  /** @type {Set<Subscription>} */
  subscriptions = new Set();

  /** @type {Set<Subscription>} */
  #waiting = new Set();

  /** The newest publication that is known. @type {Position | undefined} */
  #head;

  // State of this connection.

  /** Whether the server has confirmed a subscription, and not its end. */
  isStreaming = false;

  /** Requests without an answer, oldest first. @type {ChannelRequest[]} */
  requests = [];

  /** @param {string} name */
  constructor(name) {
    this.name = name;
  }

  /** Whether the server has been asked to subscribe, and not to unsubscribe since. */
  get isAsked() {
    const last = this.requests.at(-1);
    return last === undefined ? this.isStreaming : last.action === 'subscribe';
  }

  /** Whether a request to the server is needed. */
  get isUnsettled() {
    return this.subscriptions.size === 0 ? this.isAsked : this.#waiting.size > 0;
  }

  /** Whether there is no subscription, neither here nor at the server. */
  get isIdle() {
    return this.subscriptions.size === 0 && !this.isStreaming && this.requests.length === 0;
  }

  /**
   * Add a subscription.
   *
   * @param {Subscription} subscription
   * @returns {boolean} whether it is live already: the stream flows, will not be interrupted, and is at its beginning
   */
  join(subscription) {
    const hasStart = subscription.position !== undefined || subscription.last !== undefined;
    const hasCompany = this.isStreaming || this.subscriptions.size > 0;
    if (!hasStart && hasCompany && this.#head !== undefined) {
      subscription.position = { ...this.#head };
    }
    this.subscriptions.add(subscription);
    subscription.isLive = this.isStreaming && this.#head !== undefined && isSame(subscription.position, this.#head);
    const unsubscribed = this.requests.map(({ action }) => action).lastIndexOf('unsubscribe');
    if (subscription.isLive && unsubscribed < 0) {
      return true;
    }
    const isAnywhere = subscription.position === undefined && subscription.last === undefined;
    const request = this.requests
      .slice(unsubscribed + 1)
      .find(candidate => isAnywhere || subscription.startsLike(candidate));
    if (request === undefined) {
      this.#waiting.add(subscription);
    } else {
      request.subscriptions.add(subscription);
    }
    return false;
  }

  /**
   * Remove a subscription.
   *
   * @param {Subscription} subscription
   * @returns {boolean} whether it was the last one
   */
  leave(subscription) {
    this.#waiting.delete(subscription);
    return this.subscriptions.delete(subscription) && this.subscriptions.size === 0;
  }

  /** Make the next request; there is one if `isUnsettled`. @returns {ChannelRequest} */
  request() {
    const [first] = this.#waiting;
    const since = first?.position && { ...first.position };
    const request = new ChannelRequest(first ? 'subscribe' : 'unsubscribe', this, { since, last: first?.last });
    for (const subscription of this.#waiting) {
      if (subscription.startsLike(request)) {
        this.#waiting.delete(subscription);
        request.subscriptions.add(subscription);
      }
    }
    this.requests.push(request);
    return request;
  }

  /**
   * The server has confirmed a request to subscribe.
   *
   * @param {ChannelRequest} request
   * @param {Position & {recovered?: boolean}} answer
   * @param {number} answers how many there were on this connection, with this one
   * @returns {[Subscription, Subscribed][]} the subscriptions to tell, each with what to tell it
   */
  confirm(request, answer, answers) {
    this.#answered(request);
    this.isStreaming = true;
    this.#head = { epoch: answer.epoch, offset: answer.offset };
    return [...this.subscriptions]
      .filter(
        subscription =>
          request.subscriptions.has(subscription) ||
          // A server must not do this: the offsets of the others would mean nothing.
          (subscription.isLive && subscription.position?.epoch !== answer.epoch),
      )
      .map(subscription => [subscription, subscription.confirm(this.name, answer, answers)]);
  }

  /** The server has confirmed the end of the subscription. */
  end() {
    this.isStreaming = false;
    this.requests.splice(0, this.requests.findIndex(({ action }) => action === 'unsubscribe') + 1);
    for (const subscription of this.subscriptions) {
      subscription.isLive = false; // it joined meanwhile, and its own request is on its way
    }
  }

  /**
   * The server has refused a request; nothing has changed there.
   *
   * @param {ChannelRequest} request
   * @returns {Subscription[]} the subscriptions that this ends
   */
  refuse(request) {
    this.#answered(request);
    return [...request.subscriptions].filter(subscription => this.subscriptions.delete(subscription));
  }

  /**
   * A message has come.
   *
   * @param {number} offset
   * @returns {Position | undefined} the channel's position; undefined if the message was not asked for
   */
  advance(offset) {
    if (!this.isStreaming || this.#head === undefined) {
      return undefined;
    }
    this.#head.offset = Math.max(this.#head.offset, offset);
    return this.#head;
  }

  /**
   * The connection is gone: everything must be requested again on the next one.
   *
   * @param {number} answers how many it has brought
   */
  disconnect(answers) {
    this.isStreaming = false;
    this.requests = [];
    this.#waiting = new Set(this.subscriptions);
    for (const subscription of this.subscriptions) {
      subscription.disconnect(answers);
    }
  }

  /** @param {ChannelRequest} request */
  #answered(request) {
    this.requests = this.requests.filter(other => other !== request);
  }
}

/**
 * One WebSocket, from its opening to its end. Knows the protocol, keeps to the server's limits, and notices silence.
 *
 * The limits: the server disconnects clients that send too much too fast, and a reconnection subscribes to everything
 * at once. So requests are paced, and the number of unanswered ones is limited: requests on their way may be held up
 * and arrive together. In any span of t seconds the server thus sees at most 2 × burst + rate × t requests.
 */
class Connection {
  #settings;
  #handlers;
  #socket;
  #pace;

  /** How many of our requests have been answered, pings included. */
  answers = 0;

  /** Channels that may need a request. @type {Set<Channel>} */
  #unsettled = new Set();

  /** Requests without an answer yet, by id. @type {Map<number, ChannelRequest>} */
  #requests = new Map();
  #nextId = 1;

  /** Runs while there are unsettled channels that must wait for their turn. @type {any} */
  #paceTimer;

  /** Runs until the welcome must have come; after it, until it is time to check for silence. @type {any} */
  #silenceTimer;
  #heartbeat = LONGEST_SILENCE;
  #heardAt = 0;

  /** When the silence timer is due. */
  #lookAt = 0;

  /** Pings sent since the last message. */
  #pings = 0;

  /** @type {number | undefined} */
  #welcomedAt;

  /** @type {number | undefined} */
  #advice;

  /**
   * @param {URL} url
   * @param {typeof DEFAULTS & {WebSocket: typeof WebSocket, clock: Clock}} settings
   * @param {object} handlers
   * @param {(client: string) => void} handlers.onWelcome
   * @param {(request: ChannelRequest, answer: Position & {recovered?: boolean}) => void} handlers.onSubscribed
   * @param {(request: ChannelRequest) => void} handlers.onUnsubscribed
   * @param {(message: any) => void} handlers.onMessage
   * @param {(request: ChannelRequest | undefined, error: RealtimeError) => void} handlers.onRefused
   * @param {(ending: {code: number, reason: string, lasted: number, advice?: number}) => void} handlers.onLost called
   *     once, as the last of all: with the close code and reason, the milliseconds that the connection lasted since the
   *     server's welcome (0 without one), and those after which to come back, if the server gave them
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
    this.#socket.onerror = () => this.#expectClose();
    this.#silenceTimer = settings.clock.setTimeout(
      () => this.#abandon(ABNORMAL, 'the server did not say welcome in time'),
      settings.connectTimeout,
    );
  }

  /**
   * Send the channel's requests, as soon as the limits allow.
   *
   * @param {Channel} channel
   */
  settle(channel) {
    this.#unsettled.add(channel);
    this.#sendRequests();
  }

  /** Find out soon whether the connection still works. */
  probe() {
    if (this.#welcomedAt !== undefined && this.#pings === 0) {
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
    this.#socket.onerror = () => {}; // the package `ws` throws errors that have no listener
    this.#socket.close(code, reason);
  }

  /** After an error comes a close; but in Node 22 none comes when the server cannot be reached, or refuses. */
  #expectClose() {
    if (this.#welcomedAt === undefined) {
      this.#settings.clock.clearTimeout(this.#silenceTimer);
      this.#silenceTimer = this.#settings.clock.setTimeout(
        () => this.#abandon(ABNORMAL, 'the connection failed'),
        CLOSE_FOLLOWS,
      );
    }
  }

  /** @param {any} data */
  #receive(data) {
    this.#heardAt = this.#settings.clock.now();
    this.#pings = 0;
    const message = parsed(data);
    if (message === undefined) {
      this.#abandon(ABNORMAL, `what answers does not speak ${PROTOCOL}`);
      return;
    }
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
      case 'subscribed': {
        const request = this.#answered(message.id);
        if (request?.action === 'subscribe') {
          this.#handlers.onSubscribed(request, message);
        }
        this.#sendRequests();
        break;
      }
      case 'unsubscribed': {
        const request = this.#answered(message.id);
        if (request?.action === 'unsubscribe') {
          this.#handlers.onUnsubscribed(request);
        }
        this.#sendRequests();
        break;
      }
      case 'error': {
        const request = this.#answered(message.id);
        const channel = request?.action === 'subscribe' ? request.channel.name : undefined;
        this.#handlers.onRefused(request, new RealtimeError(message.code, message.message, channel));
        this.#sendRequests();
        break;
      }
      case 'pong':
        this.answers += 1;
        break;
      case 'goodbye':
        this.#advice = message.retry_after_ms;
        break;
      // Later versions may send events that this one does not know.
    }
  }

  /** @param {number} id */
  #answered(id) {
    const request = this.#requests.get(id);
    if (this.#requests.delete(id)) {
      this.answers += 1;
    }
    return request;
  }

  /** Send what the limits allow; the rest when the pace allows it or an answer comes. */
  #sendRequests() {
    const isOpen = this.#welcomedAt !== undefined && this.#socket.readyState === this.#settings.WebSocket.OPEN;
    if (!isOpen || this.#paceTimer !== undefined) {
      return;
    }
    for (const channel of this.#unsettled) {
      while (channel.isUnsettled) {
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
        const request = channel.request();
        const { action, since, last } = request;
        const id = this.#nextId++;
        this.#requests.set(id, request);
        this.#socket.send(JSON.stringify({ action, channel: channel.name, id, since, last }));
      }
      this.#unsettled.delete(channel);
    }
  }

  /** @param {number} delay */
  #lookAgainIn(delay) {
    const { clock } = this.#settings;
    clock.clearTimeout(this.#silenceTimer);
    this.#lookAt = clock.now() + delay;
    this.#silenceTimer = clock.setTimeout(() => this.#lookForSilence(), delay);
  }

  /**
   * Timers may be very late, and then run before the messages that arrived meanwhile. Only an unanswered ping proves
   * anything; if the page was frozen after the ping, only a second one.
   */
  #lookForSilence() {
    const now = this.#settings.clock.now();
    const silence = now - this.#heardAt;
    const wasFrozen = now - this.#lookAt > LATE;
    if (this.#pings > 1 || (this.#pings === 1 && !wasFrozen)) {
      this.#abandon(SILENT, 'nothing heard from you');
    } else if (this.#pings === 1 || silence >= this.#heartbeat) {
      this.#ping();
    } else {
      this.#lookAgainIn(this.#heartbeat - silence);
    }
  }

  #ping() {
    this.#pings += 1;
    this.#lookAgainIn(this.#settings.answerTimeout);
    if (this.#socket.readyState === this.#settings.WebSocket.OPEN) {
      this.#socket.send('{"action":"ping"}');
    }
  }

  /**
   * Give up a connection that may be dead: its own close event might take minutes.
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

/** A token bucket: `burst` at once, and `rate` a second in the long run. */
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

  /** Take a token and return 0; if there is none, return the milliseconds until there is one. */
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
 * Why a close code means that coming back unchanged is useless; undefined if it does not.
 *
 * @param {number} code
 */
function finalCause(code) {
  const isRefusal = code >= 4400 && code < 4500 && code !== SILENT && code !== SLOW_CONSUMER;
  return FINAL.get(code) ?? (isRefusal ? 'the server refuses this client' : undefined);
}

/**
 * The object in a message of the server's; undefined if it has none.
 *
 * @param {any} data
 */
function parsed(data) {
  try {
    const message = JSON.parse(data);
    return message instanceof Object ? message : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) {
      return undefined;
    }
    throw error;
  }
}

/** @param {unknown} value */
function isCount(value) {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

/**
 * @param {Position | undefined} one
 * @param {Position | undefined} other
 */
function isSame(one, other) {
  return one?.epoch === other?.epoch && one?.offset === other?.offset;
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
 * Call a handler of the page's. If it throws, the error is reported like any uncaught one. It neither keeps the next
 * handler from its message nor harms the connection.
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
