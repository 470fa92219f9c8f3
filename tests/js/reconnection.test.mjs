import assert from 'node:assert/strict';
import { test } from 'node:test';

import { World } from './fakes.mjs';

test('reconnects and subscribes again', () => {
  const world = new World();
  const messages = world.watch('news');
  world.watch('sport');
  world.socket.welcome();
  world.socket.answer();
  world.socket.hangUp(1001, 'going away');
  assert.equal(world.realtime.state, 'waiting');
  world.clock.pass(500);
  world.socket.welcome({ client: 'c-2' });
  world.socket.answer();
  assert.deepEqual(world.realtime.status, { state: 'connected', client: 'c-2' });
  assert.deepEqual(world.socket.requests, ['subscribe news', 'subscribe sport']);
  world.socket.say('message', { channel: 'news', offset: 1, data: 'back' });
  assert.deepEqual([...messages], ['back']);
  assert.deepEqual(world.states, ['connected', 'waiting', 'connecting', 'connected']);
});

test('waits longer with each failure, and never longer than 20 s', () => {
  const world = new World();
  const waits = [];
  for (let failure = 0; failure < 8; failure += 1) {
    world.socket.hangUp();
    waits.push(world.realtime.status.retryIn);
    world.clock.pass(world.realtime.status.retryIn);
  }
  assert.deepEqual(waits, [500, 1000, 2000, 4000, 8000, 16000, 20000, 20000]);
});

test('an error that no close follows, as in Node 22, ends the try soon', () => {
  const world = new World();
  world.socket.fail();
  world.clock.pass(99);
  assert.equal(world.realtime.state, 'connecting');
  world.clock.pass(1);
  assert.deepEqual(world.realtime.status, { state: 'waiting', code: 1006, reason: 'the connection failed', retryIn: 500 });
  world.socket.fail(); // the package `ws`, when a connection is given up that has not been made
  world.clock.pass(499);
  assert.equal(world.sockets.length, 1);
  world.clock.pass(1);
  world.socket.welcome();
  assert.deepEqual(world.states, ['waiting', 'connecting', 'connected']);
});

test('an error and its close are one end', () => {
  const world = new World();
  world.socket.fail();
  world.socket.hangUp();
  world.clock.pass(499);
  assert.deepEqual(world.states, ['waiting']);
  assert.equal(world.sockets.length, 1);
});

test('an error on a connection that works is followed by its close', () => {
  const world = new World();
  world.socket.welcome();
  world.socket.fail();
  world.clock.pass(1000);
  assert.equal(world.realtime.state, 'connected');
  world.socket.hangUp();
  assert.equal(world.realtime.state, 'waiting');
});

test('any time up to the longest is possible', () => {
  for (const chance of [0, 0.25, 0.999]) {
    const world = new World();
    world.chance = chance;
    world.socket.hangUp();
    world.clock.pass(500);
    world.socket.hangUp();
    assert.equal(world.realtime.status.retryIn, chance * 1000);
  }
});

test('a connection that lasted begins anew with the shortest wait; one that is cut off at once does not', () => {
  const world = new World();
  for (const [lasting, wait] of [[0, 500], [9_999, 1000], [9_999, 2000], [10_000, 500], [0, 1000]]) {
    world.socket.welcome();
    world.clock.pass(lasting);
    world.socket.hangUp();
    assert.equal(world.realtime.status.retryIn, wait);
    world.clock.pass(wait);
  }
});

test('comes back when the goodbye says', () => {
  const world = new World();
  world.socket.welcome();
  world.socket.say('goodbye', { reason: 'restart', retry_after_ms: 1740 });
  world.socket.hangUp(4503, 'restarting, come back in 9999 ms');
  assert.deepEqual(world.realtime.status, {
    state: 'waiting',
    retryIn: 1740,
    code: 4503,
    reason: 'restarting, come back in 9999 ms',
  });
  world.clock.pass(1739);
  assert.equal(world.sockets.length, 1);
  world.clock.pass(1);
  assert.equal(world.sockets.length, 2);
});

test('comes back when the reason of the close says', () => {
  const world = new World();
  world.socket.welcome();
  world.socket.hangUp(4503, 'restarting, come back in 2100 ms');
  assert.equal(world.realtime.status.retryIn, 2100);
});

test('advice that is none is not followed', () => {
  for (const [advice, wait] of [[-1, 500], ['soon', 500], [null, 500], [1e12, 600_000]]) {
    const world = new World();
    world.socket.welcome();
    world.socket.say('goodbye', { retry_after_ms: advice });
    world.socket.hangUp(4503, '');
    assert.equal(world.realtime.status.retryIn, wait, JSON.stringify(advice));
  }
});

for (const code of [1002, 1007, 1009, 4400, 4403, 4404, 4429, 4499]) {
  test(`stays away after ${code}`, () => {
    const world = new World();
    world.socket.welcome();
    world.socket.hangUp(code, 'because');
    assert.deepEqual(world.realtime.status, { state: 'closed', code, reason: 'because' });
    assert.equal(world.errors.length, 1);
    assert.equal(world.errors[0].code, 'closed');
    assert.match(world.errors[0].message, new RegExp(`coming back would not help: .+ \\(${code}, because\\)$`));
    assert.equal(world.clock.timers, 0);
    world.goOnline(true);
    assert.equal(world.sockets.length, 1);
  });
}

for (const code of [1000, 1001, 1005, 1006, 1011, 3000, 4000, 4408, 4503]) {
  test(`comes back after ${code}`, () => {
    const world = new World();
    world.socket.welcome();
    world.socket.hangUp(code);
    assert.equal(world.realtime.status.retryIn, 500);
  });
}

test('a slow consumer takes its time', () => {
  const world = new World();
  world.socket.welcome();
  world.socket.hangUp(4409);
  assert.equal(world.realtime.status.retryIn, 20_000);
});

test('close() ends everything, and connect() begins again with the same subscriptions', () => {
  const world = new World();
  const kept = world.watch('news');
  const ended = world.watch('sport');
  world.socket.welcome();
  world.realtime.close();
  world.realtime.close();
  assert.deepEqual(world.socket.closedWith, { code: 1000, reason: '' });
  assert.equal(world.realtime.state, 'closed');
  assert.equal(world.clock.timers, 0);
  world.socket.hangUp(1000);
  ended.stop();
  world.goOnline(true);
  assert.equal(world.sockets.length, 1);
  world.realtime.connect();
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'hello' });
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  assert.deepEqual([...kept], ['hello']);
  assert.deepEqual(world.states, ['connected', 'closed', 'connecting', 'connected']);
});

test('what is not realtime.v1 is given up, and tried again', () => {
  for (const nonsense of ['<html>', '7', 'null', new ArrayBuffer(8)]) {
    const world = new World();
    world.socket.onmessage({ data: nonsense });
    assert.equal(world.realtime.state, 'waiting');
    assert.match(world.realtime.status.reason, /realtime\.v1/);
    world.clock.pass(500);
    assert.equal(world.sockets.length, 2);
  }
});

test('a class that throws errors nobody listens for is listened to, until its end', () => {
  const world = new World();
  world.realtime.close();
  assert.equal(typeof world.socket.onerror, 'function');
});

test('close() while waiting', () => {
  const world = new World();
  world.socket.hangUp();
  world.realtime.close();
  world.clock.pass(60_000);
  assert.equal(world.sockets.length, 1);
});

test('connect() does not wait any longer', () => {
  const world = new World();
  world.socket.hangUp();
  world.realtime.connect();
  world.realtime.connect();
  assert.equal(world.sockets.length, 2);
  world.clock.pass(10_000);
  assert.equal(world.sockets.length, 2);
});
