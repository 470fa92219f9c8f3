import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Realtime, RealtimeError } from '../../app/realtime.js';
import { World } from './fakes.mjs';

test('speaks realtime.v1, and says nothing before the welcome', () => {
  const world = new World();
  world.watch('news');
  assert.deepEqual(world.socket.protocols, ['realtime.v1']);
  assert.deepEqual(world.socket.sent, []);
  world.socket.welcome();
  assert.deepEqual(world.socket.sent, [{ action: 'subscribe', channel: 'news', id: 1 }]);
});

test('hands over each message with its channel and offset', () => {
  const world = new World();
  const seen = [];
  world.realtime.subscribe('news', (message, source) => seen.push([message, source]));
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'hello' });
  world.socket.say('message', { channel: 'news', offset: 2, data: '' });
  world.socket.say('message', { channel: 'other', offset: 9, data: 'not asked for' });
  assert.deepEqual(seen, [
    ['hello', { channel: 'news', epoch: 'e1', offset: 1, replayed: false }],
    ['', { channel: 'news', epoch: 'e1', offset: 2, replayed: false }],
  ]);
});

test('hands over a binary message as bytes', () => {
  const world = new World();
  const messages = world.watch('news');
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, base64: 'AP+Afw==' });
  world.socket.say('message', { channel: 'news', offset: 2, base64: '' });
  assert.deepEqual([...messages], [new Uint8Array([0, 255, 128, 127]), new Uint8Array()]);
});

test('several subscriptions to a channel are one at the server', () => {
  const world = new World();
  world.socket.welcome();
  const first = world.watch('news');
  const second = world.watch('news');
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'both' });
  first.stop();
  first.stop();
  world.socket.say('message', { channel: 'news', offset: 2, data: 'second only' });
  assert.deepEqual(world.socket.requests, ['subscribe news']);
  second.stop();
  world.socket.say('message', { channel: 'news', offset: 3, data: 'nobody' });
  assert.deepEqual(world.socket.requests, ['subscribe news', 'unsubscribe news']);
  assert.deepEqual([...first], ['both']);
  assert.deepEqual([...second], ['both', 'second only']);
});

test('a subscription that is over before the connection stands is never asked for', () => {
  const world = new World();
  world.watch('news').stop();
  world.socket.welcome();
  assert.deepEqual(world.socket.requests, []);
});

test('subscribing again before the unsubscription is answered', () => {
  const world = new World();
  world.socket.welcome();
  world.watch('news').stop();
  const again = world.watch('news');
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'hello' });
  assert.deepEqual(world.socket.requests, ['subscribe news', 'unsubscribe news', 'subscribe news']);
  assert.deepEqual([...again], ['hello']);
});

test('each subscription hears that it holds, also one that joins later', async () => {
  const world = new World();
  const heard = [];
  world.realtime.subscribe('news', () => {}, { onSubscribed: subscribed => heard.push(['first', subscribed]) });
  world.realtime.addEventListener('subscribed', event => heard.push(['page', event.detail]));
  world.socket.welcome();
  assert.deepEqual(heard, []);
  world.socket.answer({ recovered: false, something: 'of a later version' });
  world.realtime.subscribe('news', () => {}, { onSubscribed: subscribed => heard.push(['second', subscribed]) });
  await Promise.resolve();
  assert.deepEqual(heard, [
    ['first', { channel: 'news', replayed: 0, missed: false }],
    ['page', { channel: 'news', replayed: 0, missed: false }],
    ['second', { channel: 'news', replayed: 0, missed: false }],
  ]);
});

test('a refused subscription is over, and its error goes to its own handler', () => {
  const world = new World();
  const errors = [];
  world.watch('a b', { onError: error => errors.push(error) });
  world.socket.welcome();
  const refusal = { id: 1, code: 'invalid_channel', message: "'a b' is not a channel name" };
  world.socket.say('error', refusal);
  assert.ok(errors[0] instanceof RealtimeError);
  assert.equal(errors[0].code, 'invalid_channel');
  assert.equal(errors[0].channel, 'a b');
  assert.equal(errors[0].message, "'a b' is not a channel name");
  assert.deepEqual(world.errors, []);
  world.socket.hangUp();
  world.clock.pass(500);
  world.socket.welcome();
  assert.deepEqual(world.socket.requests, []);
});

test('a refusal without a handler is an error event', () => {
  const world = new World();
  world.watch('news');
  world.socket.welcome();
  world.socket.say('error', { id: 1, code: 'too_many_channels', message: 'the limit is 128' });
  world.socket.say('error', { id: null, code: 'invalid_message', message: 'not JSON' });
  assert.deepEqual(world.errors.map(({ code, channel }) => [code, channel]), [
    ['too_many_channels', 'news'],
    ['invalid_message', undefined],
  ]);
});

test('an error that nobody takes care of is written to the console', t => {
  const written = t.mock.method(console, 'error', () => {});
  const world = new World();
  const ignored = new Realtime('ws://localhost/ws', { WebSocket: world.socket.constructor, clock: world.clock });
  ignored.subscribe('a b', () => {});
  world.socket.welcome();
  world.socket.say('error', { id: 1, code: 'invalid_channel', message: 'no' });
  assert.equal(written.mock.calls[0].arguments[0].code, 'invalid_channel');
});

test('a handler that throws neither keeps others from their message nor is hushed up', t => {
  const { mock } = t.mock.method(globalThis, 'queueMicrotask', () => {});
  const world = new World();
  world.realtime.subscribe('news', () => {
    throw new Error('of the page');
  });
  const messages = world.watch('news');
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'hello' });
  assert.deepEqual([...messages], ['hello']);
  assert.throws(mock.calls[0].arguments[0], /of the page/);
});

test('a handler may subscribe and unsubscribe', () => {
  const world = new World();
  const late = [];
  const stop = world.realtime.subscribe('news', () => {
    stop();
    world.realtime.subscribe('news', message => late.push(message));
  });
  world.socket.welcome();
  world.socket.answer();
  world.socket.say('message', { channel: 'news', offset: 1, data: 'one' });
  world.socket.say('message', { channel: 'news', offset: 2, data: 'two' });
  assert.deepEqual(late, ['two']);
});

test('a subscription that another one ends does not get the message at hand', () => {
  const world = new World();
  world.realtime.subscribe('news', () => second.stop());
  const second = world.watch('news');
  world.socket.welcome();
  world.socket.answer();
  world.say(1);
  assert.deepEqual([...second], []);
});

test('wrong arguments are noticed at once', () => {
  const { realtime } = new World();
  assert.throws(() => realtime.subscribe(7, () => {}), TypeError);
  assert.throws(() => realtime.subscribe('news'), TypeError);
  assert.throws(() => new Realtime('ws://localhost/ws', { WebSocket: undefined }), /WebSocket/);
});
