/** Nothing is lost across a reconnection, nothing comes twice; and what is lost for good is said to be. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { World } from './fakes.mjs';
import { Hub, seededChance } from './hub.mjs';

/** A world whose page has the messages 1 to 5 of `news`, and has lost its connection. */
function cutOffAfterFive() {
  const world = new World();
  world.heard = [];
  world.messages = world.watch('news', { onSubscribed: subscribed => world.heard.push(subscribed) });
  world.socket.welcome();
  world.socket.answer({ epoch: 'e1', offset: 4 });
  world.say(5);
  assert.deepEqual([...world.messages], [5]);
  world.messages.length = world.heard.length = 0;
  world.socket.hangUp();
  world.clock.pass(500);
  world.socket.welcome();
  return world;
}

test('subscribes again from the last message there was', () => {
  const world = cutOffAfterFive();
  assert.deepEqual(world.socket.sent, [{ action: 'subscribe', channel: 'news', id: 1, since: { epoch: 'e1', offset: 5 } }]);
});

test('hands over what was missed, then what is new, and says which is which', () => {
  const world = cutOffAfterFive();
  const sources = [];
  world.realtime.subscribe('news', (message, source) => sources.push(source));
  world.socket.answer({ epoch: 'e1', offset: 7, recovered: true });
  assert.deepEqual(world.heard, [{ channel: 'news', recovered: true, replayed: 2, missed: false }]);
  for (const offset of [6, 7, 8]) {
    world.say(offset);
  }
  assert.deepEqual([...world.messages], [6, 7, 8]);
  assert.deepEqual(sources.map(({ offset, replayed }) => [offset, replayed]), [[6, true], [7, true], [8, false]]);
});

for (const [name, answer, expected] of [
  ['nothing was published', { epoch: 'e1', offset: 5, recovered: true }, { recovered: true, replayed: 0, missed: false }],
  ['history does not reach back', { epoch: 'e1', offset: 300, recovered: false }, { recovered: false, replayed: 0, missed: true }],
  ['offsets began anew', { epoch: 'e2', offset: 5, recovered: false }, { recovered: false, replayed: 0, missed: true }],
  ['the server knows no recovery, and nothing was published', { epoch: 'e1', offset: 5 }, { recovered: true, replayed: 0, missed: false }],
  ['the server knows no recovery', { epoch: 'e1', offset: 6 }, { recovered: false, replayed: 0, missed: true }],
  ['the server contradicts itself about the epoch', { epoch: 'e2', offset: 6, recovered: true }, { recovered: false, replayed: 0, missed: true }],
  ['the server contradicts itself about the offset', { epoch: 'e1', offset: 3, recovered: true }, { recovered: false, replayed: 0, missed: true }],
]) {
  test(`what the page hears when ${name}`, () => {
    const world = cutOffAfterFive();
    world.socket.answer(answer);
    assert.deepEqual(world.heard, [{ channel: 'news', ...expected }]);
    world.say(answer.offset + 1);
    assert.deepEqual([...world.messages], [answer.offset + 1], 'what follows is handed over in any case');
    world.socket.hangUp();
    world.clock.pass(world.realtime.status.retryIn);
    world.socket.welcome();
    assert.deepEqual(world.socket.sent[0].since, { epoch: answer.epoch, offset: answer.offset + 1 });
  });
}

test('a replay that is cut off goes on where it was', () => {
  const world = cutOffAfterFive();
  world.socket.answer({ epoch: 'e1', offset: 8, recovered: true });
  world.say(6);
  world.socket.hangUp();
  world.clock.pass(world.realtime.status.retryIn);
  world.socket.welcome();
  assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 6 });
  world.socket.answer({ epoch: 'e1', offset: 9, recovered: true });
  assert.equal(world.heard.at(-1).replayed, 3);
  for (const offset of [7, 8, 9, 10]) {
    world.say(offset);
  }
  assert.deepEqual([...world.messages], [6, 7, 8, 9, 10]);
});

test('a connection that ends before the answer changes nothing', () => {
  const world = cutOffAfterFive();
  world.socket.hangUp();
  world.clock.pass(world.realtime.status.retryIn);
  world.socket.welcome();
  assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 5 });
});

test('what comes twice is handed over once', () => {
  const world = cutOffAfterFive();
  world.socket.answer({ epoch: 'e1', offset: 6, recovered: true });
  for (const offset of [4, 5, 6, 6, 7, 6, 7, 8]) {
    world.say(offset);
  }
  assert.deepEqual([...world.messages], [6, 7, 8]);
});

test('an offset is compared with those of its own epoch only', () => {
  const world = cutOffAfterFive();
  world.socket.answer({ epoch: 'e2', offset: 0, recovered: false });
  for (const offset of [1, 2]) {
    world.say(offset);
  }
  assert.deepEqual([...world.messages], [1, 2]);
});

test('who subscribes while the unsubscription is on its way misses nothing', () => {
  const world = new World();
  const first = world.watch('news');
  world.socket.welcome();
  world.socket.answer({ epoch: 'e1', offset: 0 });
  world.say(1);
  first.stop();
  const heard = [];
  const again = world.watch('news', { onSubscribed: subscribed => heard.push(subscribed) });
  world.say(2); // published before the server heard of the unsubscription
  assert.deepEqual(world.socket.sent.at(-1).since, { epoch: 'e1', offset: 1 });
  world.socket.answer({ epoch: 'e1', offset: 3, recovered: true });
  world.say(2);
  world.say(3);
  assert.deepEqual([...again], [2, 3]);
  assert.deepEqual(heard, [{ channel: 'news', recovered: true, replayed: 1, missed: false }]);
});

test('a subscription that ended is forgotten: the next one begins anew', () => {
  const world = cutOffAfterFive();
  world.socket.answer({ epoch: 'e1', offset: 5, recovered: true });
  world.messages.stop();
  world.socket.answer();
  world.watch('news');
  assert.equal(world.socket.sent.at(-1).action, 'subscribe');
  assert.equal(world.socket.sent.at(-1).since, undefined);
});

test('a page may go on from where it was before it was loaded again', () => {
  const world = new World();
  const heard = [];
  const messages = world.watch('news', {
    since: { epoch: 'e1', offset: 41 },
    onSubscribed: subscribed => heard.push(subscribed),
  });
  world.socket.welcome();
  assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 41 });
  world.socket.answer({ epoch: 'e1', offset: 42, recovered: true });
  world.say(42);
  assert.deepEqual([...messages], [42]);
  assert.deepEqual(heard, [{ channel: 'news', recovered: true, replayed: 1, missed: false }]);
});

test('close() and connect() lose nothing either', () => {
  const world = cutOffAfterFive();
  world.realtime.close();
  world.realtime.connect();
  world.socket.welcome();
  assert.deepEqual(world.socket.sent[0].since, { epoch: 'e1', offset: 5 });
});

test('whatever happens: each message once, in order, and none is missing unless the page was told', () => {
  let told = 0;
  let recovered = 0;
  for (let seed = 1; seed <= 200; seed += 1) {
    const chance = seededChance(seed);
    const hub = new Hub(12);
    const world = new World({ random: chance });
    /** What the page knows: the positions of its messages, and `gap` where it was told that some are missing. */
    let story = [];
    let stop;
    const subscribe = () => {
      story = [];
      stop = world.realtime.subscribe('news', message => story.push(message), {
        onSubscribed: subscribed => {
          told += subscribed.missed ? 1 : 0;
          recovered += subscribed.replayed;
          story.push(subscribed.missed ? 'gap' : 'held');
        },
      });
    };
    const read = () => {
      const isMore = hub.toServer < world.socket.sent.length;
      if (isMore) {
        hub.read(world.socket.sent[hub.toServer++]);
      }
      return isMore;
    };
    const reconnect = () => {
      if (world.realtime.state === 'waiting') {
        world.clock.pass(world.realtime.status.retryIn);
        world.socket.welcome();
      }
    };
    const deeds = [
      [30, () => hub.publish()],
      [30, () => world.realtime.state === 'connected' && read()],
      [60, () => hub.toClient.length > 0 && world.socket.say(...hub.toClient.shift())],
      [4, () => {
        if (world.realtime.state === 'connected') {
          hub.connectionLost();
          world.socket.hangUp([1006, 1001, 4408, 4503][Math.floor(chance() * 4)]);
        }
      }],
      [8, reconnect],
      [1, () => hub.offset > 3 && world.realtime.state === 'waiting' && hub.restart()],
      [2, () => {
        stop();
        if (chance() < 0.7) {
          stop = () => {};
          subscribe();
        }
      }],
    ];
    subscribe();
    world.socket.welcome();
    const check = () => {
      let previous;
      for (const entry of story) {
        if (entry === 'gap') {
          previous = undefined;
        } else if (entry !== 'held') {
          const [epoch, offset] = entry.split('/').map(Number);
          assert.ok(
            previous === undefined || (epoch === previous[0] && offset === previous[1] + 1),
            `seed ${seed}: ${story.join(' ')}`,
          );
          previous = [epoch, offset];
        }
      }
    };
    for (let step = 0; step < 600; step += 1) {
      let lot = chance() * deeds.reduce((sum, [weight]) => sum + weight, 0);
      deeds.find(([weight]) => (lot -= weight) < 0)[1]();
    }
    check();
    // And in the end, when nothing happens any more, the page is where the server is.
    reconnect();
    stop();
    subscribe();
    while (read() || hub.toClient.length > 0) {
      if (hub.toClient.length > 0) {
        world.socket.say(...hub.toClient.shift());
      }
    }
    hub.publish();
    world.socket.say(...hub.toClient.shift());
    assert.equal(story.at(-1), `${hub.epoch}/${hub.offset}`, `seed ${seed}`);
    check();
  }
  assert.ok(told > 50 && recovered > 500, `the test has seen too little: ${told} gaps, ${recovered} recovered messages`);
});
