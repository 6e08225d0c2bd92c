// Runs the cases through openai-node: node openai_node.mjs URL CASES.json. The last line is the answers.
import fs from 'node:fs';
import OpenAI from 'openai';
import { VERSION } from 'openai/version';

const [url, file] = process.argv.slice(2);

async function run({ body, key }) {
    const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
    const answer = await client.chat.completions.create(body);
    if (!body.stream) {
        const { choices, usage } = answer;
        return {
            texts: choices.map(choice => choice.message.content),
            finish: choices.map(choice => choice.finish_reason),
            tokens: [usage.prompt_tokens, usage.completion_tokens],
        };
    }
    let text = '', finish = null;
    for await (const chunk of answer) {
        text += chunk.choices[0]?.delta.content ?? '';
        finish = chunk.choices[0]?.finish_reason ?? finish;
    }
    return { texts: [text], finish: [finish] };
}

const answers = {};
for (const item of JSON.parse(fs.readFileSync(file, 'utf8'))) {
    try {
        answers[item.name] = await run(item);
    } catch (error) {
        answers[item.name] = { status: error.status ?? null, error: `${error.name}: ${error.message}` };
    }
}
console.log(JSON.stringify([VERSION, answers]));
