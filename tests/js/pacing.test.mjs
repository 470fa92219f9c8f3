/** The server allows 50 messages a second with a burst of 100, and cuts off who sends more. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { World } from './fakes.mjs';

const RATE = 50;
const BURST = 100;

/** The server's meter: whether all of the arrival times, in milliseconds, are within its limits. */
function isAllowed(arrivals) {
  let tokens = BURST;
  let before = 0;
  return arrivals.every(at => {
    tokens = Math.min(BURST, tokens + ((at - before) * RATE) / 1000) - 1;
    before = at;
    return tokens >= 0;
  });
}

function crowded() {
  const world = new World();
  for (let number = 0; number < 128; number += 1) {
    world.watch(`channel-${number}`);
  }
  return world;
}

test('subscriptions to 128 channels go out at a pace that the server allows, in order', () => {
  const world = crowded();
  const times = [];
  world.socket.welcome();
  for (let time = 0; time < 5000; time += 5) {
    while (times.length < world.socket.sent.length) {
      times.push(time);
    }
    world.socket.answer();
    world.clock.pass(5);
  }
  assert.deepEqual(world.socket.requests, Array.from({ length: 128 }, (_, number) => `subscribe channel-${number}`));
  assert.ok(isAllowed(times));
  assert.ok(times.at(-1) < 2500, `it took ${times.at(-1)} ms`);
});

test('a network that holds everything up for a while does not make it too much either', () => {
  const world = crowded();
  const heldUpFor = 1500;
  const times = [];
  world.socket.welcome();
  for (let time = 0; time < 8000; time += 5) {
    while (times.length < world.socket.sent.length) {
      times.push(Math.max(time, heldUpFor));
    }
    if (time >= heldUpFor) {
      world.socket.answer();
    }
    world.clock.pass(5);
  }
  assert.equal(times.length, 128);
  assert.ok(isAllowed(times));
});

test('what changes its mind while it waits for its turn is not sent at all', () => {
  const world = new World({ burst: 1, rate: 1 });
  world.socket.welcome();
  world.watch('first');
  const second = world.watch('second');
  const third = world.watch('third');
  world.socket.answer();
  second.stop();
  third.stop();
  world.watch('third');
  world.clock.pass(1000);
  world.socket.answer();
  world.clock.pass(10_000);
  assert.deepEqual(world.socket.requests, ['subscribe first', 'subscribe third']);
});

test('a new connection begins a new count', () => {
  const world = crowded();
  world.socket.welcome();
  world.socket.hangUp();
  world.clock.pass(500);
  world.socket.welcome();
  assert.equal(world.socket.requests.length, 48);
  world.clock.pass(60_000);
  assert.equal(world.sockets[0].requests.length, 48);
});
