/** Connections that are dead without having ended, and networks that come and go. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { World } from './fakes.mjs';

test('pings after a heartbeat of silence, and is content with any answer', () => {
  const world = new World();
  world.watch('news');
  world.socket.welcome();
  world.socket.answer();
  world.clock.pass(24_999);
  assert.equal(world.socket.pings, 0);
  world.clock.pass(1);
  assert.equal(world.socket.pings, 1);
  world.clock.pass(9_999);
  world.socket.say('pong');
  world.clock.pass(25_000);
  assert.equal(world.socket.pings, 2);
  world.socket.say('message', { channel: 'news', offset: 1, data: '' });
  world.clock.pass(24_999);
  assert.equal(world.realtime.state, 'connected');
});

test('messages are signs of life: no ping while they come', () => {
  const world = new World();
  world.watch('news');
  world.socket.welcome();
  for (let offset = 1; offset <= 100; offset += 1) {
    world.socket.say('message', { channel: 'news', offset, data: '' });
    world.clock.pass(1000);
  }
  assert.equal(world.socket.pings, 0);
});

test('a ping without an answer means that the connection is dead', () => {
  const world = new World();
  world.socket.welcome();
  world.clock.pass(34_999);
  assert.equal(world.realtime.state, 'connected');
  world.clock.pass(1);
  assert.equal(world.realtime.status.code, 4408);
  assert.equal(world.socket.closedWith.code, 4408);
  world.socket.hangUp(1006); // the browser notices at last
  world.socket.say('message', { channel: 'news', offset: 1, data: 'too late' });
  world.clock.pass(500);
  assert.equal(world.sockets.length, 2);
  assert.deepEqual(world.states, ['connected', 'waiting', 'connecting']);
});

test('a timer that runs late proves nothing', () => {
  const world = new World();
  world.socket.welcome();
  world.clock.sleep(3_600_000);
  world.clock.pass(0);
  assert.equal(world.realtime.state, 'connected');
  assert.equal(world.socket.pings, 1);
  world.clock.sleep(3_600_000); // frozen with the ping on its way: the pong is there, and not handed over yet
  world.clock.pass(0);
  assert.equal(world.realtime.state, 'connected');
  assert.equal(world.socket.pings, 2);
  world.socket.say('pong');
  world.clock.pass(24_999);
  assert.equal(world.socket.pings, 2);
  assert.equal(world.realtime.state, 'connected');
});

test('timers that are always late, as in the background, do not keep a dead connection alive', () => {
  const world = new World();
  world.socket.welcome();
  for (let minute = 1; minute <= 3; minute += 1) {
    world.clock.sleep(60_000);
    world.clock.pass(0);
  }
  assert.equal(world.realtime.status.code, 4408);
  assert.equal(world.socket.pings, 2);
});

test('keeps to the heartbeat of the welcome, within reason', () => {
  for (const [heartbeat, silence] of [[5, 5_000], [1e9, 55_000], [undefined, 55_000]]) {
    const world = new World();
    world.socket.welcome({ heartbeat });
    world.clock.pass(silence - 1);
    assert.equal(world.socket.pings, 0);
    world.clock.pass(1);
    assert.equal(world.socket.pings, 1);
  }
});

test('a connection without a welcome is given up', () => {
  const world = new World();
  world.clock.pass(15_000);
  assert.equal(world.realtime.state, 'waiting');
  assert.ok(world.socket.closedWith);
  assert.match(world.realtime.status.reason, /welcome/);
});

test('going offline shows in the state, and tries go on: browsers may be wrong', () => {
  const world = new World();
  world.socket.hangUp();
  world.goOnline(false);
  assert.equal(world.realtime.state, 'offline');
  assert.equal(world.realtime.status.retryIn, 500);
  world.clock.pass(500);
  world.socket.hangUp();
  assert.equal(world.realtime.state, 'offline');
  world.clock.pass(1000);
  world.socket.welcome();
  assert.equal(world.realtime.state, 'connected');
});

test('coming online ends a long wait, though not for everyone at the same moment', () => {
  const world = new World();
  for (let failure = 0; failure < 8; failure += 1) {
    world.socket.hangUp();
    world.clock.pass(world.realtime.status.retryIn);
  }
  world.socket.hangUp();
  assert.equal(world.realtime.status.retryIn, 20_000);
  world.goOnline(false);
  world.chance = 0.5;
  world.goOnline(true);
  assert.equal(world.realtime.state, 'waiting');
  assert.equal(world.realtime.status.retryIn, 250);
});

test('a change of network makes sure of the connection at once', () => {
  for (const online of [true, false]) {
    const world = new World();
    world.socket.welcome();
    world.goOnline(online);
    world.goOnline(online);
    assert.equal(world.socket.pings, 1);
    world.clock.pass(10_000);
    assert.equal(world.realtime.state, online ? 'waiting' : 'offline');
  }
});

test('coming online does not hurry what the server has advised', () => {
  const world = new World();
  world.socket.welcome();
  world.socket.hangUp(4503, 'restarting, come back in 2100 ms');
  world.goOnline(false);
  assert.equal(world.realtime.state, 'offline');
  world.goOnline(true);
  assert.equal(world.realtime.state, 'waiting');
  world.show('visible');
  world.clock.pass(2_099);
  assert.equal(world.sockets.length, 1);
  world.clock.pass(1);
  assert.equal(world.sockets.length, 2);
});

/** A world that has failed to connect so often that it waits for 20 s. */
function longWaiting() {
  const world = new World();
  for (let failure = 0; failure < 8; failure += 1) {
    world.socket.hangUp();
    world.clock.pass(world.realtime.status.retryIn);
  }
  world.socket.hangUp();
  assert.equal(world.realtime.status.retryIn, 20_000);
  world.chance = 0.5;
  return world;
}

for (const [name, happen] of [
  ['is looked at', world => world.show('visible')],
  ['is no longer frozen', world => world.network.document.dispatchEvent(new Event('resume'))],
  ['comes back from the cache', world => world.turnPage('pageshow', { persisted: true })],
]) {
  test(`a page that ${name} waits no longer, and makes sure of its connection`, () => {
    const waiting = longWaiting();
    happen(waiting);
    assert.equal(waiting.realtime.status.retryIn, 250);

    const connected = new World();
    connected.socket.welcome();
    happen(connected);
    happen(connected);
    assert.equal(connected.socket.pings, 1);
    connected.clock.pass(10_000);
    assert.equal(connected.realtime.state, 'waiting');
  });
}

test('a page that nobody looks at does not hurry', () => {
  const world = longWaiting();
  world.show('hidden');
  world.turnPage('pageshow', { persisted: false });
  assert.equal(world.realtime.status.retryIn, 20_000);
});

test('looking at the page does not make a long wait between tries a short one', () => {
  const world = longWaiting();
  world.show('visible');
  world.clock.pass(250);
  world.socket.hangUp();
  assert.equal(world.realtime.status.retryIn, 10_000);
});

test('a page that the browser may keep closes its connection, and goes on when it comes back', () => {
  const world = new World();
  const messages = world.watch('news');
  world.socket.welcome();
  world.socket.answer({ epoch: 'e1', offset: 4 });
  world.turnPage('pagehide', { persisted: true });
  assert.deepEqual(world.socket.closedWith, { code: 1000, reason: '' });
  assert.equal(world.realtime.state, 'waiting');
  world.clock.sleep(3_600_000);
  world.turnPage('pageshow', { persisted: true });
  world.clock.pass(0);
  world.socket.welcome();
  assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 4 });
  world.socket.answer({ epoch: 'e1', offset: 5, recovered: true });
  world.say(5);
  assert.deepEqual([...messages], [5]);
});

test('a page that goes for good leaves the goodbye to the browser', () => {
  const world = new World();
  world.socket.welcome();
  world.turnPage('pagehide', { persisted: false });
  assert.equal(world.realtime.state, 'connected');
});

test('once closed it heeds nothing any more', () => {
  const world = new World();
  world.socket.welcome();
  world.realtime.close();
  world.goOnline(true);
  world.show('visible');
  world.turnPage('pageshow', { persisted: true });
  world.network.document.dispatchEvent(new Event('resume'));
  assert.equal(world.realtime.state, 'closed');
  assert.equal(world.clock.timers, 0);
});
