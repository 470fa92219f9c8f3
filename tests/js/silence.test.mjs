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
