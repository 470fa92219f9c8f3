/** Each subscription has a position of its own, whatever the others to its channel have had. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { World } from './fakes.mjs';
import { Hub, seededChance } from './hub.mjs';

/** A world with a server that has the messages 1 to 3 of `news`; `exchange` lets both say all they have to say. */
function served({ published = 3, reach = 100, knowsLast = true } = {}) {
  const hub = new Hub(reach, { knowsLast });
  const world = new World();
  for (let number = 0; number < published; number += 1) {
    hub.publish();
  }
  const exchange = () => {
    while (hub.toServer < world.socket.sent.length || hub.toClient.length > 0) {
      while (hub.toServer < world.socket.sent.length) {
        hub.read(world.socket.sent[hub.toServer++]);
      }
      while (hub.toClient.length > 0) {
        world.socket.say(...hub.toClient.shift());
      }
    }
  };
  const lose = () => {
    hub.connectionLost();
    world.socket.hangUp();
  };
  const reconnect = () => {
    world.clock.pass(world.realtime.status.retryIn);
    world.socket.welcome();
  };
  world.socket.welcome();
  return { hub, world, exchange, lose, reconnect };
}

const START = { epoch: 'e1', offset: 0 };

/** Subscribe, and return what was heard: messages, and answers as `recovered/replayed`. */
function listen(world, options) {
  const heard = [];
  heard.stop = world.realtime.subscribe('news', message => heard.push(message), {
    onSubscribed: ({ recovered, replayed }) => heard.push(`${recovered} ${replayed}`),
    ...options,
  });
  return heard;
}

test('since counts when the last subscription ended in the same tick', () => {
  const { world, exchange } = served();
  const first = listen(world);
  exchange();
  first.stop();
  const second = listen(world, { since: START });
  exchange();
  assert.deepEqual([...first], ['undefined 0']);
  assert.deepEqual([...second], ['true 3', '1/1', '1/2', '1/3']);
});

test('since counts while the unsubscription must wait for its turn', () => {
  const world = new World({ burst: 1, rate: 1 });
  const hub = new Hub(100);
  hub.publish();
  world.socket.welcome();
  const first = listen(world);
  hub.read(world.socket.sent[0]);
  world.socket.say(...hub.toClient.shift());
  first.stop();
  const second = listen(world, { since: START });
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  world.clock.pass(1000);
  assert.deepEqual(world.socket.requests, ['subscribe news', 'subscribe news'], 'its end was never asked for');
  hub.read(world.socket.sent[1]);
  hub.toClient.forEach(said => world.socket.say(...said));
  assert.deepEqual([...second], ['true 1', '1/1']);
});

test('a subscription that is over while it waits for its turn is never asked for', () => {
  const world = new World({ burst: 1, rate: 1 });
  world.socket.welcome();
  const first = listen(world);
  world.socket.answer();
  listen(world, { since: START }).stop();
  world.clock.pass(1000);
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  const second = listen(world, { since: START });
  second.stop();
  first.stop();
  world.clock.pass(1000);
  assert.deepEqual(world.socket.requests, ['subscribe news', 'unsubscribe news']);
});

test('a subscription that goes on from a later place gets nothing that it has', () => {
  const { hub, world, exchange } = served({ published: 0 });
  const first = listen(world);
  exchange();
  hub.publish();
  hub.publish(); // on their way
  first.stop();
  const second = listen(world, { since: { epoch: 'e1', offset: 2 } });
  exchange();
  hub.publish();
  exchange();
  assert.deepEqual([...second], ['true 0', '1/3']);
});

test('since counts beside other subscriptions, and they get nothing twice', () => {
  const { hub, world, exchange } = served();
  const first = listen(world);
  exchange();
  hub.publish();
  exchange();
  const second = listen(world, { since: { epoch: 'e1', offset: 1 } });
  exchange();
  hub.publish();
  exchange();
  assert.deepEqual([...first], ['undefined 0', '1/4', '1/5']);
  assert.deepEqual([...second], ['true 3', '1/2', '1/3', '1/4', '1/5']);
});

test('since at the newest message needs no request', async () => {
  const { hub, world, exchange } = served();
  listen(world);
  exchange();
  const second = listen(world, { since: { epoch: 'e1', offset: 3 } });
  await Promise.resolve();
  hub.publish();
  exchange();
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  assert.deepEqual([...second], ['true 0', '1/4']);
});

test('a subscription that joins others is not told that it holds when the connection is closed in the same tick', async () => {
  const { world, hub, exchange } = served();
  listen(world);
  exchange();
  const second = listen(world);
  world.realtime.close();
  hub.connectionLost();
  await Promise.resolve();
  assert.deepEqual([...second], []);
  hub.publish();
  world.realtime.connect();
  world.socket.welcome();
  exchange();
  assert.deepEqual([...second], ['true 1', '1/4']);
});

test('a newcomer gets nothing of what another one asked for with since', () => {
  const { world, exchange } = served();
  const first = listen(world, { since: START });
  const second = listen(world);
  exchange();
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  assert.deepEqual([...first], ['true 3', '1/1', '1/2', '1/3']);
  assert.deepEqual([...second], ['undefined 0']);
});

test('subscriptions that begin at the same place are one request', () => {
  const { world, exchange } = served();
  const both = [listen(world, { since: START }), listen(world, { since: { ...START } })];
  exchange();
  assert.equal(world.socket.sent.length, 1);
  both.forEach(heard => assert.deepEqual([...heard], ['true 3', '1/1', '1/2', '1/3']));
});

test('the answer to a request whose subscription is over confirms no other', () => {
  const { hub, world, exchange } = served();
  listen(world).stop();
  const second = listen(world);
  hub.read(world.socket.sent[hub.toServer++]); // the first subscription
  world.socket.say(...hub.toClient.shift());
  assert.deepEqual([...second], []);
  hub.publish();
  exchange();
  assert.deepEqual([...second], ['undefined 0']);
  hub.publish();
  exchange();
  assert.deepEqual([...second], ['undefined 0', '1/5']);
});

test('a page that mounts, unmounts and mounts again within a tick has everything once', () => {
  const { hub, world, exchange } = served();
  let kept = START;
  const seen = [];
  const mount = () =>
    world.realtime.subscribe('news', (message, source) => { seen.push(message); kept = source; }, { since: kept });
  let unmount = mount();
  for (let round = 0; round < 5; round += 1) {
    unmount();
    unmount = mount();
    exchange();
    unmount();
    hub.publish();
    unmount = mount();
    exchange();
  }
  assert.deepEqual(seen, [1, 2, 3, 4, 5, 6, 7, 8].map(offset => `1/${offset}`));
});

test('subscriptions that are at different places when the connection is lost go on from there, each', () => {
  const { hub, world, exchange, lose, reconnect } = served();
  const first = listen(world);
  exchange();
  const second = listen(world, { since: START });
  hub.read(world.socket.sent[hub.toServer++]);
  hub.toClient.splice(0, 2).forEach(said => world.socket.say(...said)); // the answer and the first message
  lose();
  hub.publish();
  reconnect();
  assert.deepEqual(world.socket.sent.map(({ since }) => since.offset), [3, 1]);
  exchange();
  assert.deepEqual([...first], ['undefined 0', 'true 1', '1/4']);
  assert.deepEqual([...second], ['true 3', '1/1', 'true 3', '1/2', '1/3', '1/4']);
});

test('a refusal concerns those who asked for what is refused', () => {
  const world = new World();
  world.socket.welcome();
  const refused = [];
  const first = listen(world);
  world.socket.answer();
  const second = listen(world, { last: 5, onError: error => refused.push(error.code) });
  const third = listen(world);
  world.socket.say('error', { id: 2, code: 'invalid_message', message: 'no' });
  world.say(1);
  assert.deepEqual(refused, ['invalid_message']);
  assert.deepEqual([...first], ['undefined 0', 1]);
  assert.deepEqual([...second], []);
  assert.deepEqual([...third], [1]);
  first.stop();
  third.stop();
  assert.equal(world.socket.requests.at(-1), 'unsubscribe news', 'the subscription at the server was still there');
});

test('a server that changes its epoch under a subscription is understood', () => {
  const world = new World();
  world.socket.welcome();
  const first = listen(world);
  world.socket.answer({ epoch: 'e1', offset: 9 });
  listen(world, { last: 1 });
  world.socket.answer({ epoch: 'e2', offset: 1 });
  world.say(2);
  assert.deepEqual([...first], ['undefined 0', 'false 0', 2]);
});

test('a closed connection in the middle of a message loses it for nobody', () => {
  const { hub, world, exchange } = served({ published: 0 });
  world.realtime.subscribe('news', () => world.realtime.close());
  const second = listen(world);
  exchange();
  hub.publish();
  exchange();
  assert.deepEqual([...second], ['undefined 0']);
  hub.connectionLost();
  world.realtime.connect();
  world.socket.welcome();
  exchange();
  assert.deepEqual([...second], ['undefined 0', 'true 1', '1/1']);
});

// The newest messages that are kept.

test('last has the newest messages handed over, as replayed ones', () => {
  const { hub, world, exchange } = served();
  const sources = [];
  world.realtime.subscribe('news', (_, source) => sources.push([source.offset, source.replayed]), { last: 2 });
  const all = listen(world, { last: 20 });
  exchange();
  hub.publish();
  exchange();
  assert.deepEqual(world.socket.sent.map(({ since, last }) => [since, last]), [[undefined, 2], [undefined, 20]]);
  assert.deepEqual(sources, [[2, true], [3, true], [4, false]]);
  assert.deepEqual([...all], ['undefined 0', '1/1', '1/2', '1/3', '1/4']);
});

test('since comes before last', () => {
  const { world, exchange } = served();
  const heard = listen(world, { since: { epoch: 'e1', offset: 2 }, last: 20 });
  exchange();
  assert.equal(world.socket.sent[0].last, undefined);
  assert.deepEqual([...heard], ['true 1', '1/3']);
  const fresh = listen(world, { since: null, last: 1 });
  exchange();
  assert.deepEqual([...fresh], ['undefined 0', '1/3']);
});

test('last counts beside other subscriptions, and when they have just ended', () => {
  const { world, exchange } = served();
  const first = listen(world);
  exchange();
  const second = listen(world, { last: 1 });
  exchange();
  first.stop();
  second.stop();
  const third = listen(world, { last: 2 });
  exchange();
  assert.deepEqual([...first], ['undefined 0']);
  assert.deepEqual([...second], ['undefined 0', '1/3']);
  assert.deepEqual([...third], ['undefined 0', '1/2', '1/3']);
});

test('last is asked for until the server has answered, and never again', () => {
  const { hub, world, exchange, lose, reconnect } = served();
  const heard = listen(world, { last: 2 });
  lose();
  reconnect();
  assert.equal(world.socket.sent[0].last, 2);
  exchange();
  lose();
  hub.publish();
  reconnect();
  assert.deepEqual([world.socket.sent[0].last, world.socket.sent[0].since], [undefined, { epoch: 'e1', offset: 3 }]);
  exchange();
  assert.deepEqual([...heard], ['undefined 0', '1/2', '1/3', 'true 1', '1/4']);
});

test('what last asked for is made up for when the connection is lost before it comes', () => {
  const { hub, world, exchange, lose, reconnect } = served();
  const heard = listen(world, { last: 2 });
  hub.read(world.socket.sent[hub.toServer++]);
  world.socket.say(...hub.toClient.shift()); // the answer alone
  lose();
  reconnect();
  exchange();
  assert.deepEqual([...heard], ['undefined 0', 'true 2', '1/2', '1/3']);
});

for (const [name, server] of [
  ['a server that has kept nothing', { reach: 0 }],
  ['a server that does not know last', { knowsLast: false }],
]) {
  test(`last with ${name}`, () => {
    const { hub, world, exchange, lose, reconnect } = served(server);
    const heard = listen(world, { last: 2 });
    exchange();
    world.clock.pass(25_000); // a ping, and its answer: the replay is complete
    exchange();
    lose();
    reconnect();
    assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 3 });
    exchange();
    hub.publish();
    exchange();
    assert.deepEqual([...heard], ['undefined 0', 'true 0', '1/4'], 'it is not told that something is missing');
  });
}

test('a message bears its time if the server says it', () => {
  const world = new World();
  const times = [];
  world.realtime.subscribe('news', (_, source) => times.push('time' in source ? source.time : 'none'));
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: '', time: 1_764_500_000_123 });
  world.socket.say('message', { channel: 'news', offset: 2, data: '' });
  world.socket.say('message', { channel: 'news', offset: 3, data: '', time: 'noon' });
  assert.deepEqual(times, [1_764_500_000_123, 'none', 'none']);
});

test('a place or a number that is none is noticed at once', () => {
  const { realtime } = new World();
  for (const since of [0, 'e1', {}, { epoch: 'e1' }, { epoch: 1, offset: 1 }, { epoch: 'e1', offset: -1 }, { epoch: 'e1', offset: 0.5 }]) {
    assert.throws(() => realtime.subscribe('news', () => {}, { since }), /since is a position/);
  }
  for (const last of [-1, 1.5, '20', {}, NaN]) {
    assert.throws(() => realtime.subscribe('news', () => {}, { last }), /last is a number/);
  }
  realtime.subscribe('news', () => {}, { since: null, last: null });
});

// In random order.

/** What one subscription may hear: a model of its own, which knows the server's answers but nothing of the client. */
class Expectation {
  active = true;
  messages = 0;
  confirmed = 0;
  gap = false;

  constructor({ since, last }, known) {
    this.since = since;
    this.last = last;
    this.known = known && { ...known }; // where the page is with this channel, at the moment of subscribing
    this.position = since && { ...since };
  }

  /** @param {object | undefined} answer the server's, unless the subscription joined one that holds */
  subscribed(told, answer, replayFrom) {
    assert.ok(this.active, 'it is over');
    const place = answer ?? this.known;
    const isFirst = this.confirmed++ === 0;
    assert.equal(told.missed, told.recovered === false);
    if (isFirst && this.since === undefined && this.last !== undefined) {
      assert.equal(told.recovered, undefined);
      this.position = { epoch: place.epoch, offset: replayFrom - 1 };
    } else if (told.recovered === undefined) {
      assert.ok(isFirst && this.since === undefined, 'there was something to go on from');
      this.position = { epoch: place.epoch, offset: place.offset };
    } else if (told.missed) {
      assert.equal(answer.recovered, false, 'the server said nothing of it');
      this.position = { epoch: answer.epoch, offset: answer.offset };
    } else {
      this.position ??= { ...this.known };
      assert.deepEqual([place.epoch, told.replayed], [this.position.epoch, place.offset - this.position.offset]);
    }
    this.upTo = place.offset;
  }

  message(text, { epoch, offset, replayed }) {
    assert.ok(this.active, 'it is over');
    assert.equal(text, `${epoch.slice(1)}/${offset}`);
    // Before it is confirmed it may only continue the stream that flows.
    this.position ??= this.known && { ...this.known };
    assert.deepEqual([epoch, offset], [this.position?.epoch, this.position.offset + 1]);
    this.position.offset = offset;
    this.messages += 1;
    if (this.confirmed > 0 && this.since !== undefined) {
      assert.equal(replayed, offset <= this.upTo);
    }
  }
}

/** One run: a page whose parts come and go, a server, and a network between them. */
class Run {
  subscriptions = [];
  kept = [];

  /** @param {() => void} runLater runs what is queued for the end of this turn */
  constructor(seed, runLater) {
    this.chance = seededChance(seed);
    this.runLater = runLater;
    this.hub = new Hub([0, 3, 12, 1000][this.pick(4)]);
    this.world = new World({ random: this.chance, ...(this.chance() < 0.5 && { burst: 2, rate: 20 }) });
    this.world.socket.welcome();
  }

  pick(count) {
    return Math.floor(this.chance() * count);
  }

  get state() {
    return this.world.realtime.state;
  }

  read() {
    const { hub, world } = this;
    const isMore = this.state === 'connected' && hub.toServer < world.socket.sent.length;
    if (isMore) {
      hub.read(world.socket.sent[hub.toServer++]);
    }
    return isMore;
  }

  say() {
    const { hub, world } = this;
    const said = hub.toClient.shift();
    if (said === undefined) {
      return false;
    }
    const [event, fields] = said;
    if (event === 'subscribed') {
      const next = hub.toClient[0]?.[0] === 'message' ? hub.toClient[0][1].offset : Infinity;
      this.answer = fields;
      this.replayFrom = Math.min(next, fields.offset + 1);
      this.known = { epoch: fields.epoch, offset: fields.offset };
      this.isStreaming = true;
    } else if (event === 'unsubscribed') {
      this.isStreaming = false;
    } else if (event === 'message' && this.isStreaming) {
      this.known.offset = Math.max(this.known.offset, fields.offset);
    }
    world.socket.say(event, fields);
    this.runLater();
    this.answer = undefined;
    return true;
  }

  join(options = {}) {
    // Without others, and without a stream that flows, there is nothing to go on from.
    const hasCompany = this.isStreaming || this.subscriptions.some(({ expected }) => expected.active);
    const expected = new Expectation(options, hasCompany ? this.known : undefined);
    const hear = (message, source) => {
      expected.message(message, source);
      this.kept.push({ epoch: source.epoch, offset: source.offset });
    };
    const onSubscribed = told => expected.subscribed(told, this.answer, this.replayFrom);
    const stop = this.world.realtime.subscribe('news', hear, { ...options, onSubscribed });
    this.subscriptions.push({ expected, stop });
  }

  joinAnyhow() {
    const kind = this.pick(3);
    if (kind === 0) {
      this.join();
    } else if (kind === 1) {
      this.join({ last: this.pick(8) });
    } else {
      const place = this.chance() < 0.5 ? this.kept.at(-1 - this.pick(4)) : undefined;
      this.join({ since: place ?? { epoch: this.hub.position.epoch, offset: this.pick(this.hub.offset + 1) } });
    }
  }

  leave() {
    const active = this.subscriptions.filter(({ expected }) => expected.active);
    if (active.length > 0) {
      const { expected, stop } = active[this.pick(active.length)];
      expected.active = false;
      stop();
    }
  }

  leaveAll() {
    for (const { expected, stop } of this.subscriptions) {
      expected.active = false;
      stop();
    }
  }

  lost() {
    this.hub.connectionLost();
    this.isStreaming = false;
  }

  reconnect() {
    if (this.state === 'closed') {
      this.world.realtime.connect();
    } else if (this.state === 'waiting') {
      this.world.clock.pass(this.world.realtime.status.retryIn);
    }
    if (this.state === 'connecting') {
      this.world.socket.welcome();
    }
  }

  deeds = [
    [25, () => this.hub.publish()],
    [30, () => this.read()],
    [60, () => this.say()],
    [8, () => this.world.clock.pass(30)],
    [5, () => this.joinAnyhow()],
    [4, () => this.leave()],
    [2, () => { this.leaveAll(); this.joinAnyhow(); }],
    [2, () => { this.leaveAll(); this.joinAnyhow(); this.leaveAll(); this.joinAnyhow(); }],
    [2, () => {
      if (this.state === 'connected') {
        this.lost();
        this.world.socket.hangUp(1006);
      }
    }],
    [1, () => {
      if (this.state !== 'closed') {
        this.lost();
        this.world.realtime.close();
      }
    }],
    [12, () => this.reconnect()],
    [1, () => this.state !== 'connected' && this.hub.restart()],
  ];

  step() {
    let lot = this.chance() * this.deeds.reduce((sum, [weight]) => sum + weight, 0);
    this.deeds.find(([weight]) => (lot -= weight) < 0)[1]();
    this.runLater();
  }

  /** In the end, when nothing more happens, everyone is where the server is. */
  settle() {
    this.reconnect();
    const exchange = () => {
      for (let idle = 0; idle < 30; idle += 1) {
        while (this.read() || this.say()) {
          idle = 0;
        }
        this.world.clock.pass(50);
      }
    };
    exchange();
    this.hub.publish();
    exchange();
    const active = this.subscriptions.map(({ expected }) => expected).filter(expected => expected.active);
    active.forEach(expected => assert.deepEqual(expected.position, this.hub.position));
    assert.equal(this.hub.subscribed, active.length > 0, 'the server has one subscription if there is one here');
    assert.deepEqual(this.world.errors, []);
    return this.subscriptions.reduce((sum, { expected }) => sum + expected.messages, 0);
  }
}

test('in whatever order: subscriptions have what is theirs, once, in order, or are told', t => {
  // An assertion that fails in a handler must not be taken for an error of the page's.
  const later = [];
  t.mock.method(globalThis, 'queueMicrotask', task => later.push(task));
  let messages = 0;
  for (let seed = 1; seed <= 400; seed += 1) {
    const run = new Run(seed, () => later.splice(0).forEach(task => task()));
    try {
      for (let step = 0; step < 400; step += 1) {
        run.step();
      }
      messages += run.settle();
    } catch (error) {
      error.message = `seed ${seed}: ${error.message}`;
      throw error;
    }
  }
  assert.ok(messages > 10_000, `the test has seen too little: ${messages} messages`);
});
