// Made from realtime.js by TypeScript: `make types`.

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
    constructor(code: string, message: string, channel?: string);
    code: string;
    channel: string | undefined;
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
    /**
     * Connect at once, without waiting for the outcome.
     *
     * @param {string | URL} [url] where WebSockets are served; relative to the page, and `http` means `ws`
     * @param {Options} [options]
     */
    constructor(url?: string | URL, options?: Options);
    /** What the connection is doing. */
    get state(): State;
    /** The connection's state, with its details. */
    get status(): Status;
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
    subscribe(channel: string, onMessage: MessageHandler, options?: SubscribeOptions): () => void;
    /**
     * As in every EventTarget, with the types of these events.
     *
     * @template {keyof RealtimeEvents} Type
     * @param {Type} type
     * @param {((event: RealtimeEvents[Type]) => void) | {handleEvent(event: RealtimeEvents[Type]): void} | null} listener
     * @param {boolean | AddEventListenerOptions} [options]
     */
    addEventListener<Type extends keyof RealtimeEvents>(type: Type, listener: ((event: RealtimeEvents[Type]) => void) | {
        handleEvent(event: RealtimeEvents[Type]): void;
    } | null, options?: boolean | AddEventListenerOptions): void;
    /**
     * As in every EventTarget, with the types of these events.
     *
     * @template {keyof RealtimeEvents} Type
     * @param {Type} type
     * @param {((event: RealtimeEvents[Type]) => void) | {handleEvent(event: RealtimeEvents[Type]): void} | null} listener
     * @param {boolean | EventListenerOptions} [options]
     */
    removeEventListener<Type extends keyof RealtimeEvents>(type: Type, listener: ((event: RealtimeEvents[Type]) => void) | {
        handleEvent(event: RealtimeEvents[Type]): void;
    } | null, options?: boolean | EventListenerOptions): void;
    /** Connect now: instead of waiting any longer, or again after `close()`. Subscriptions are kept. */
    connect(): void;
    /** Close the connection, and stay away until `connect()` is called. */
    close(): void;
    #private;
}
/**
 * What the connection is doing.
 *
 * - `connecting`: a connection is being made
 * - `connected`: the server has sent its welcome
 * - `waiting`: there is no connection, and after a while there is another try
 * - `offline`: the same, while the browser says that it has no network
 * - `closed`: there is no connection and there will be none, until `connect()` is called
 */
export type State = "connecting" | "connected" | "waiting" | "offline" | "closed";
export type Status = {
    state: State;
    /**
     * when connected: this connection's name, as `realtimectl clients` shows it
     */
    client?: string | undefined;
    /**
     * when waiting or offline: milliseconds until the next try
     */
    retryIn?: number | undefined;
    /**
     * why the last connection ended: the close code, see section 5 of docs/protocol.md
     */
    code?: number | undefined;
    /**
     * the same in words, often empty
     */
    reason?: string | undefined;
};
/**
 * A place in a channel's stream of messages.
 */
export type Position = {
    /**
     * offsets mean something only within one epoch
     */
    epoch: string;
    /**
     * numbers the messages of a channel one by one
     */
    offset: number;
};
/**
 * The place of a message. It can be kept and passed as `since`.
 */
export type Source = {
    channel: string;
    epoch: string;
    offset: number;
    /**
     * whether it was published before the server confirmed this subscription: while this
     * client was away, or before it first connected
     */
    replayed: boolean;
    /**
     * when it was published, in milliseconds since 1970 by the server's clock, like `Date.now()`;
     * absent if the server does not send it
     */
    time?: number | undefined;
};
export type MessageHandler = (message: string | Uint8Array, source: Source) => void;
/**
 * The server's confirmation of a subscription, for the first time or again after a new connection.
 */
export type Subscribed = {
    channel: string;
    /**
     * when there was a position to continue from: true if every message since then is here
     * or follows; false if messages are missing, because the server's history does not reach back that far
     */
    recovered?: boolean | undefined;
    /**
     * how many missed messages follow now; those that `last` asked for are not counted
     */
    replayed: number;
    /**
     * whether messages are missing: `recovered === false`
     */
    missed: boolean;
};
export type SubscribeOptions = {
    /**
     * called each time the server confirms the subscription
     */
    onSubscribed?: ((subscribed: Subscribed) => void) | undefined;
    /**
     * called when the server refuses the subscription, which is then
     * over; without it the error becomes an `error` event of the `Realtime`
     */
    onError?: ((error: RealtimeError) => void) | undefined;
    /**
     * deliver first what was published after this: the position of the last message
     * that the page has, kept over a reload for instance. Other subscriptions to the channel get none of it again.
     */
    since?: Position | null | undefined;
    /**
     * deliver first the newest messages that the server keeps, at most this many; no
     * effect beside `since`, nor with a server that does not know `last`. After a reconnection the subscription
     * continues from the last message it had.
     */
    last?: number | null | undefined;
};
/**
 * A clock with timers. Times are milliseconds.
 */
export type Clock = {
    now: () => number;
    setTimeout: (callback: () => void, delay: number) => any;
    clearTimeout: (timer: any) => void;
};
/**
 * All times are milliseconds.
 */
export type Options = {
    /**
     * the first try to reconnect comes within this time, which doubles with each try
     */
    minDelay?: number | undefined;
    /**
     * the limit of that time
     */
    maxDelay?: number | undefined;
    /**
     * how long a connection may take until the server's welcome
     */
    connectTimeout?: number | undefined;
    /**
     * how long a ping may go unanswered before the connection counts as dead
     */
    answerTimeout?: number | undefined;
    /**
     * subscriptions a second, in the long run; the server's inbound-rate must be higher
     */
    rate?: number | undefined;
    /**
     * subscriptions at once; the server's inbound-burst must be more than twice that
     */
    burst?: number | undefined;
    /**
     * the class to connect with
     */
    WebSocket?: {
        new (url: string | URL, protocols?: string | string[]): WebSocket;
        prototype: WebSocket;
        readonly CONNECTING: 0;
        readonly OPEN: 1;
        readonly CLOSING: 2;
        readonly CLOSED: 3;
    } | undefined;
    clock?: Clock | undefined;
    /**
     * a number from 0 up to 1, like Math.random
     */
    random?: (() => number) | undefined;
    /**
     * the source of events (`online`, `pageshow` and the like, and those of its `document`) and of
     * `navigator.onLine`
     */
    window?: any;
};
/**
 * The events of a {@link Realtime}, by type.
 */
export type RealtimeEvents = {
    state: DetailedEvent<Status>;
    subscribed: DetailedEvent<Subscribed>;
    error: DetailedEvent<RealtimeError>;
};
/**
 * An event with a detail; Node has CustomEvent only since version 19.
 *
 * @template T
 */
declare class DetailedEvent<T> extends Event {
    /**
     * @param {string} type
     * @param {T} detail
     * @param {EventInit} [init]
     */
    constructor(type: string, detail: T, init?: EventInit);
    detail: T;
}
export {};
