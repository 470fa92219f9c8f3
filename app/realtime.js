/**
 * The browser's side of realtimed: subscribe to channels, and have every message that is broadcast on them.
 *
 *     import { Realtime } from './realtime.js';
 *
 *     const realtime = new Realtime('/ws');
 *     const unsubscribe = realtime.subscribe('news', message => console.log(message));
 *
 * It connects by itself, notices when the connection is lost or dead, comes back at a time that is not everyone else's,
 * subscribes again from where it was, and hands over what was missed: each message once, in order. When the server's
 * history does not reach back that far, it says so. An ES module without dependencies, for browsers and for Node 22;
 * for Node 18 and 20 when given a WebSocket class, such as that of the package `ws`.
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
 * A place in a channel's stream of messages.
 *
 * @typedef {object} Position
 * @property {string} epoch offsets mean something only within one epoch
 * @property {number} offset numbers the messages of a channel one by one
 */

/**
 * Where a message comes from.
 *
 * @typedef {object} Source
 * @property {string} channel
 * @property {string} epoch
 * @property {number} offset
 * @property {boolean} replayed whether it was published while this client was away
 */

/** @typedef {(message: string | Uint8Array, source: Source) => void} MessageHandler */

/**
 * The server's word that a subscription holds, for the first time or again after a new connection.
 *
 * @typedef {object} Subscribed
 * @property {string} channel
 * @property {boolean} [recovered] when there was something to go on from: true if every message since then is here or
 *     follows; false if messages are missing, because the server's history does not reach back that far
 * @property {number} replayed how many missed messages follow now
 * @property {boolean} missed whether messages are missing: `recovered === false`
 */

/**
 * @typedef {object} SubscribeOptions
 * @property {(subscribed: Subscribed) => void} [onSubscribed] each time that the server confirms the subscription
 * @property {(error: RealtimeError) => void} [onError] the server refuses the subscription, which is over then; without
 *     this the error is an `error` event of the `Realtime`
 * @property {Position} [since] have what was published after this too, for instance what the page has kept over a
 *     reload. Without effect if the channel has a subscription already.
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
 * @property {any} [window] whose events to heed (`online`, `pageshow` and the like, and those of its `document`), and
 *     whose `navigator.onLine`
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

/** So long after an error its close has followed, if one does. */
const CLOSE_FOLLOWS = 100;

/** A timer that is later than this did not run because the page was frozen, or the computer asleep. */
const LATE = 2_000;

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

/** The connection broke without a close code; browsers say so too (RFC 6455 section 7.1.5). */
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
 * An event that says more; Node has CustomEvent only since version 19.
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
 * - `subscribed`: the server has confirmed a channel's subscription; `event.detail` is the {@link Subscribed} that the
 *   `onSubscribed` of each subscription to it was called with
 * - `error`: the server has refused something, or has closed the connection for good; `event.detail` is a
 *   {@link RealtimeError}. Unless a listener calls `event.preventDefault()`, it is written to the console.
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

  /** Whether it was the server that said when to come back: nothing hurries this. */
  #advised = false;

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
   * Have `onMessage` called with every message of a channel, once and in order, from the moment the server has
   * confirmed it. What is published while the connection is down comes when it is back; see {@link Subscribed}.
   *
   * Any number of subscriptions to one channel are one at the server. One that joins while the connection is down has
   * what the others have missed, too.
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
    const entry = this.#channels.get(channel) ?? new Channel(options.since);
    this.#channels.set(channel, entry);
    entry.subscriptions.add(subscription);
    if (entry.confirmed) {
      queueMicrotask(() => {
        if (entry.subscriptions.has(subscription)) {
          subscription.onSubscribed?.({ channel, replayed: 0, missed: false });
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
        since: name => this.#channels.get(name)?.position,
        onWelcome: client => this.#welcomed(client),
        onSubscribed: answer => this.#subscribed(answer),
        onUnsubscribed: name => this.#unsubscribed(name),
        onMessage: message => this.#deliver(message),
        onRefused: error => this.#refused(error),
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
    channel.confirmed = true;
    channel.replayedUpTo = offset;
    /** @type {Subscribed} */
    const subscribed = { channel: name, replayed: 0, missed: false };
    const known = channel.position;
    if (known?.epoch === epoch && (recovered === true ? known.offset <= offset : known.offset === offset)) {
      // What is known stays as it is: the messages that follow begin behind it, not behind the newest.
      subscribed.recovered = true;
      subscribed.replayed = offset - known.offset;
    } else {
      channel.position = { epoch, offset };
      if (known !== undefined) {
        subscribed.recovered = false;
        subscribed.missed = true;
      }
    }
    for (const { onSubscribed } of [...channel.subscriptions]) {
      guarded(() => onSubscribed?.({ ...subscribed }));
    }
    this.dispatchEvent(new DetailedEvent('subscribed', subscribed));
  }

  /** @param {string} name */
  #unsubscribed(name) {
    const channel = this.#channels.get(name);
    if (channel !== undefined) {
      // With its position: who has subscribed in the meantime goes on from there.
      channel.confirmed = false;
      if (channel.subscriptions.size === 0) {
        this.#channels.delete(name);
      }
    }
  }

  /** @param {{channel: string, offset: number, data?: string, base64?: string}} message */
  #deliver({ channel: name, offset, data, base64 }) {
    const channel = this.#channels.get(name);
    if (channel?.position === undefined || offset <= channel.position.offset) {
      return; // nobody has asked for it, or everyone has it
    }
    channel.position.offset = offset;
    const { epoch } = channel.position;
    const replayed = offset <= channel.replayedUpTo;
    const content = base64 === undefined ? data ?? '' : bytes(base64);
    for (const subscription of [...channel.subscriptions]) {
      if (channel.subscriptions.has(subscription)) {
        guarded(() => subscription.onMessage(content, { channel: name, epoch, offset, replayed }));
      }
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
    // The server's advice is different for each client already. Without it, chance keeps clients apart that were lost
    // together: any time up to the longest is as likely as another ("full jitter").
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

  /** Wait no longer than for the first try, which others may make at the same moment: chance has its part in it too. */
  #hurry() {
    if (this.#retryTimer !== undefined) {
      const { code, reason } = this.#status;
      const soon = this.#advised ? Infinity : this.#settings.random() * this.#settings.minDelay;
      this.#wait(Math.min(this.#untilRetry(), soon), { code, reason }, this.#advised);
    }
    this.#connection?.probe();
  }

  // What happens around. A browser may be wrong about it, so it changes when something is tried, never whether.

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

  /** Somebody looks at the page, which may have been frozen: timers late, the connection long dead. */
  #awake = () => {
    if (this.#settings.window.document?.visibilityState !== 'hidden') {
      this.#hurry();
    }
  };

  /**
   * The browser may keep the page for the way back to it. No browser keeps the WebSocket, and some do not keep a page
   * that has one open. Should the page live on, so does the timer.
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

  /** Whose events are heeded unless the connection is closed. @returns {[any, string, (event: any) => void][]} */
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

/** What is known of one channel, over all connections. */
class Channel {
  /** Whether the server has confirmed the subscription, on the connection there is now. */
  confirmed = false;

  /** The newest message that was handed over, or the one to go on from. @type {Position | undefined} */
  position;

  /** The newest message there was when the subscription was confirmed: whatever comes up to it is late. */
  replayedUpTo = 0;

  /** @type {Set<{onMessage: MessageHandler} & SubscribeOptions>} */
  subscriptions = new Set();

  /** @param {Position} [since] */
  constructor(since) {
    this.position = since && { epoch: since.epoch, offset: since.offset };
  }
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
 * @property {(name: string) => Position | undefined} since what to go on from
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

  /** When the silence timer is due. */
  #lookAt = 0;

  /** Pings that were sent since anything was heard. */
  #pings = 0;

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
    this.#socket.onerror = () => this.#expectClose();
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
    this.#socket.onerror = () => {}; // the package `ws` throws what nobody listens for
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
    const since = action === 'subscribe' ? this.#handlers.since(channel) : undefined;
    this.#socket.send(JSON.stringify({ action, channel, id, since }));
  }

  /** @param {number} delay */
  #lookAgainIn(delay) {
    const { clock } = this.#settings;
    clock.clearTimeout(this.#silenceTimer);
    this.#lookAt = clock.now() + delay;
    this.#silenceTimer = clock.setTimeout(() => this.#lookForSilence(), delay);
  }

  /**
   * Timers may be very late, and after that come before what the server has said meanwhile: only a ping that goes
   * unanswered proves anything, and if the page was frozen after the ping, only a second one.
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
 * Why a close code means that coming back unchanged is useless; undefined if it does not.
 *
 * @param {number} code
 */
function finalCause(code) {
  const isRefusal = code >= 4400 && code < 4500 && code !== SILENT && code !== SLOW_CONSUMER;
  return FINAL.get(code) ?? (isRefusal ? 'the server refuses this client' : undefined);
}

/**
 * The object that a message of the server's is; undefined if it is none.
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
